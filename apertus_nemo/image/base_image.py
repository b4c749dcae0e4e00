"""The base of an image, as its registry has it: which digests, and whether it is what the definition says.

    looked = look_at_base(definition.base, ["linux/arm64"])
    looked.platforms["linux/arm64"]        # {"config_digest", "manifest_digest"}, or unknown with the reason

Reads manifests and a configuration, some kilobytes; no layer. Where the registry cannot be
reached, everything is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.errors import Differs, InputError, UnfitEnvironment
from apertus_nemo.image.definition import Base
from apertus_nemo.image.layout import Image
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.python_packages import normal
from apertus_nemo.image.reference import Reference
from apertus_nemo.record.canonical import loads, unknown
from apertus_nemo.record.files import read_bytes

_MAX_LIST_BYTES = 4 * 2**20

Look = Callable[[Reference, Platform], Image]


@dataclass(frozen=True)
class Looked:
    """What was found of a base."""

    digest_is_of: Any  # "index" or "manifest"
    environment: Any  # variable -> value, of those that the definition names
    platforms: Mapping[str, Any]
    conflicts: list[str] = field(default_factory=list)


def look_at_base(base: Base, platforms: Sequence[str], *, look: Look) -> Looked:
    """Ask the registry. Raises InputError where it has the base and the base is not what the definition says of it."""
    reference = Reference.parse(f"{base.reference}@{base.digest}")
    found: dict[str, Any] = {}
    environment: dict[str, str] = {}
    index = False
    conflicts: list[str] = []
    for platform in platforms:
        try:
            image = look(reference, Platform.parse(platform))
        except UnfitEnvironment:  # why is of the machine, and has no place in a lock
            reason = unknown(f"{reference.registry} could not be reached from where this was resolved")
            return Looked(reason, reason, dict.fromkeys(platforms, reason))
        except (InputError, Differs) as error:
            raise InputError(f"the base {reference}: {error}") from error
        index = image.index is not None
        found[platform] = {"config_digest": image.manifest.config.digest, "manifest_digest": image.descriptor.digest}
        has = dict(entry.partition("=")[::2] for entry in image.config.environment)
        for name, wanted in base.environment:
            if not has.get(name, "").startswith(wanted):
                shown = has.get(name, "nothing")
                conflicts.append(f"{platform}: the base has {name} {shown[:80]!r}, the definition says {wanted!r}")
            environment[name] = has.get(name, "")
    return Looked("index" if index else "manifest", environment, found, conflicts)


def from_registry(environment: Mapping[str, str]) -> Look:
    """Asks the registry that a reference names, with the credentials that `environment` leads to."""

    def look(reference: Reference, platform: Platform) -> Image:
        from apertus_nemo.image.registry import Repository
        from apertus_nemo.image.registry_http import Limits

        with Repository(reference, environment=environment, limits=Limits(attempts=3)) as repository:
            return repository.image(repository.resolve(str(reference.digest)), platform)

    return look


def read_packages(path: Path) -> dict[str, str]:
    """Name -> version of what `pip list --format json` printed; raises InputError."""
    tree = loads(read_bytes(path, max_bytes=_MAX_LIST_BYTES), what=str(path))
    good = isinstance(tree, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("version"), str)
        for one in tree
    )
    if not good or not tree:
        raise InputError(f"{path}: is not what `pip list --format json` prints")
    return {normal(one["name"]): one["version"] for one in tree}
