"""Families of images and their versions: what there is, and what a name such as "gh200-1.0.0" stands for.

    found = find("cpu-1.0.0")
    found.family, found.version, found.state            # "cpu", "1.0.0", "unbuilt"
    found.releases                                      # {"linux/amd64": Release(...)}, empty while unbuilt

Definitions, locks and releases are files of `containers/<family>/`. A release is written by `image publish`, once: a
version that has one means these digests for ever. This module reads JSON and TOML, and no network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.record.canonical import loads
from apertus_nemo.record.files import read_bytes

DEFINITION = "image.toml"
LOCK = "lock.json"
RELEASES = "releases.json"
MAX_BYTES = 16 * 2**20  # of a definition, a lock or a list of releases

FAMILY = re.compile(r"[a-z][a-z0-9]{0,31}\Z")
# Semantic versions 2.0.0 without build metadata, which tags of registries cannot hold.
VERSION = re.compile(r"(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})(-[0-9A-Za-z]+(\.[0-9A-Za-z]+)*)?\Z")
PLATFORM = re.compile(r"linux/(amd64|arm64)\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_RELEASE_KEYS = frozenset({"config_digest", "lock_digest", "manifest_digest", "reference"})


@dataclass(frozen=True)
class Release:
    """A published image of one platform."""

    config_digest: str
    lock_digest: str  # SHA-256 of the image lock that it was built from, "sha256:<hex>"
    manifest_digest: str
    reference: str  # where it was pushed: HOST/NAME:TAG, for reading; the digest is what counts


@dataclass(frozen=True)
class Family:
    """A version of a family, as the files of `containers/` know it."""

    family: str
    version: str
    folder: Path
    releases: Mapping[str, Release]  # by platform

    @property
    def name(self) -> str:
        """As in "gh200-1.0.0"."""
        return f"{self.family}-{self.version}"

    @property
    def state(self) -> str:
        """ "published" where a release is recorded, else "unbuilt": an image that only one machine has is nobody's."""
        return "published" if self.releases else "unbuilt"

    @property
    def file_name(self) -> str:
        """Without dots, as names of EDFs must be: "gh200-1-0-0"."""
        return self.name.replace(".", "-")


def parse_name(text: str) -> tuple[str, str]:
    """("gh200", "1.0.0") of "gh200-1.0.0". Raises InputError for anything else."""
    family, dash, version = text.partition("-")
    if not dash or not FAMILY.match(family) or not VERSION.match(version):
        raise InputError(f"{text[:100]!r} is not the name of an image: write a family and a version, as in gh200-1.0.0")
    return family, version


@lru_cache(maxsize=1)
def containers_folder() -> Path:
    """The folder of families: inside an installed wheel, else beside the package in a checkout."""
    from importlib.resources import files

    package = files("apertus_nemo")
    for candidate in (package / "resources" / "containers", package / ".." / "containers"):
        folder = Path(str(candidate))
        if folder.is_dir():
            return folder.resolve()
    raise UnfitEnvironment("the definitions of images are missing from the installation; install apertus-nemo again")


def family_names(folder: Path | None = None) -> list[str]:
    """Every family that has a definition, sorted."""
    folder = containers_folder() if folder is None else folder
    return sorted(path.parent.name for path in folder.glob(f"*/{DEFINITION}"))


def find(name: str, folder: Path | None = None) -> Family:
    """The image of a name, or of a family alone: then its current version.

    Raises InputError where there is no such family, or no such version of it.
    """
    folder = containers_folder() if folder is None else folder
    family, version = (name, None) if FAMILY.match(name) else parse_name(name)
    here = folder / family
    if not (here / DEFINITION).is_file():
        raise InputError(f"there is no family of images {family!r}; there are {', '.join(family_names(folder))}")
    current = _version(here / DEFINITION)
    released = read_releases(here)
    version = current if version is None else version
    if version != current and version not in released:
        known = ", ".join(f"{family}-{one}" for one in sorted({current, *released}))
        raise InputError(f"{family} has no version {version}; there are {known}")
    return Family(family, version, here, released.get(version, {}))


def versions(family: str, folder: Path | None = None) -> list[Family]:
    """Every version of a family, the current one last."""
    current = find(family, folder)
    released = read_releases(current.folder)
    older = [Family(family, one, current.folder, released[one]) for one in sorted(released) if one != current.version]
    return [*older, current]


def _version(path: Path) -> str:
    """The version that a definition gives itself."""
    import tomllib

    try:
        version = tomllib.loads(read_bytes(path, max_bytes=MAX_BYTES).decode()).get("version")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not TOML: {error}") from error
    if not isinstance(version, str) or not VERSION.match(version):
        raise InputError(f"{path}: version {str(version)[:40]!r} is not a semantic version such as 1.0.0")
    return version


def read_releases(folder: Path) -> dict[str, dict[str, Release]]:
    """version -> platform -> Release, of one family; empty where nothing was published. Raises InputError."""
    path = folder / RELEASES
    if not path.exists():
        return {}
    tree = loads(read_bytes(path, max_bytes=MAX_BYTES), what=str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: is not a list of releases")
    return {version: _of_version(platforms, version, path) for version, platforms in tree.items()}


def _of_version(platforms: Any, version: str, path: Path) -> dict[str, Release]:
    if not VERSION.match(version) or not isinstance(platforms, dict) or not platforms:
        raise InputError(f"{path}: {version[:40]!r} is not a version with platforms")
    found = {}
    for platform, entry in platforms.items():
        what = f"{path}: {version}: {platform[:40]}"
        if not PLATFORM.match(platform) or not isinstance(entry, dict) or set(entry) != _RELEASE_KEYS:
            raise InputError(f"{what}: must hold {', '.join(sorted(_RELEASE_KEYS))}")
        for key in sorted(_RELEASE_KEYS):
            if not isinstance(entry[key], str) or (key.endswith("_digest") and not _DIGEST.match(entry[key])):
                raise InputError(f"{what}: {key} {str(entry[key])[:80]!r} is not what it should be")
        found[platform] = Release(**entry)
    return found
