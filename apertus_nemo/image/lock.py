"""The lock of a family of images, `containers/<family>/lock.json`: every package with version and hash.

    lock = read_lock(folder / "lock.json")
    lock.unresolved            # [] where an image can be built from it
    lock.debian("linux/arm64"), lock.python("linux/arm64")
    stale(lock, definition, root)                # what has changed since: [] where it still fits

What could not be found out is written as unknown, with the reason; nothing is left out and nothing is made up. The file
is JSON with sorted keys, an entry a line, so that a change of a version is a change of a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.image.debian import DebianPackage
from apertus_nemo.image.definition import Definition
from apertus_nemo.image.families import FAMILY, MAX_BYTES, PLATFORM, VERSION
from apertus_nemo.image.python_packages import PythonPackage, bounds
from apertus_nemo.record.canonical import is_unknown, loads, sha256_hex
from apertus_nemo.record.files import file_sha256, read_bytes

SCHEMA_VERSION = 1
_FIELDS = {"base", "conflicts", "definition_digest", "family", "platforms", "schema_version", "version"}
_PLATFORM_FIELDS = {"base", "debian", "python", "requirements"}
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]{0,99}\Z")
_TEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~:!_-]{0,199}\Z")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~:%!_-]*(/[A-Za-z0-9][A-Za-z0-9.+~:%!_-]*)*\Z")


@dataclass(frozen=True)
class ImageLock:
    """The fields of a lock, by name; as `parse_lock` has checked them, or as `resolve` made them."""

    tree: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """The whole content of the file."""
        return (json.dumps(self.tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @cached_property
    def digest(self) -> str:
        """ "sha256:<hex>" over `to_bytes`: with the source of our package, the identity of an image."""
        return f"sha256:{sha256_hex(self.to_bytes())}"

    @property
    def name(self) -> str:
        """As in "cpu-1.0.0"."""
        return f"{self.tree['family']}-{self.tree['version']}"

    @property
    def platforms(self) -> list[str]:
        """Sorted."""
        return sorted(self.tree["platforms"])

    def debian(self, platform: str) -> list[DebianPackage]:
        """Debian packages; those of a base that is an image are not listed."""
        return [DebianPackage(**entry) for entry in self.tree["platforms"][platform]["debian"]]

    def python(self, platform: str) -> list[PythonPackage]:
        """Python packages; those that the base provides are not listed."""
        return [PythonPackage(**entry) for entry in self.tree["platforms"][platform]["python"]]

    @property
    def unresolved(self) -> list[str]:
        """One line for each unknown thing and each conflict; an image is built only where there is none."""
        found = [f"{path}: {reason}" for path, reason in _unknowns(self.tree, "")]
        return found + [f"conflict: {text}" for text in self.tree["conflicts"]]


def _unknowns(value: Any, path: str) -> list[tuple[str, str]]:
    if is_unknown(value):
        return [(path, value["unknown"])]
    if isinstance(value, Mapping):
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in sorted(value.items())]
    elif isinstance(value, list):
        items = [(f"{path}.{number}", item) for number, item in enumerate(value)]
    else:
        return []
    return [found for key, item in items for found in _unknowns(item, key)]


def make_lock(
    definition: Definition,
    *,
    base: Mapping[str, Any],
    platforms: Mapping[str, Mapping[str, Any]],
    conflicts: Sequence[str],
) -> ImageLock:
    """The lock of what was resolved; `platforms` holds for each the fields of `platform_entry`."""
    return ImageLock(
        {
            "base": dict(base),
            "conflicts": sorted(conflicts),
            "definition_digest": f"sha256:{definition.digest}",
            "family": definition.family,
            "platforms": {name: dict(entry) for name, entry in platforms.items()},
            "schema_version": SCHEMA_VERSION,
            "version": definition.version,
        }
    )


def platform_entry(
    *,
    base: Mapping[str, Any] | None,
    debian: Sequence[DebianPackage],
    python: Sequence[PythonPackage],
    requirements: Mapping[str, str],
) -> dict[str, Any]:
    """One platform: of its base the digests (None where it is made from packages), packages, hashes of requirements."""
    return {
        "base": None if base is None else dict(base),
        "debian": [asdict(one) for one in sorted(debian)],
        "python": [asdict(one) for one in sorted(python)],
        "requirements": dict(requirements),
    }


def read_lock(path: Path) -> ImageLock:
    """Read a lock; raises InputError where it is none, or was not written by this version."""
    return parse_lock(read_bytes(path, max_bytes=MAX_BYTES), what=str(path))


def parse_lock(data: bytes, *, what: str) -> ImageLock:
    """As `read_lock`, of bytes; `what` begins every message."""
    tree = loads(data, what=what, max_bytes=MAX_BYTES)
    if not isinstance(tree, dict) or "schema_version" not in tree or "definition_digest" not in tree:
        raise InputError(f"{what}: is not the lock of an image")
    if tree["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{what}: has schema version {_shown(tree['schema_version'])}; this version reads {SCHEMA_VERSION}"
        )
    _keys(tree, _FIELDS, what)
    _match(tree, "family", FAMILY, what)
    _match(tree, "version", VERSION, what)
    _match(tree, "definition_digest", _DIGEST, what)
    if not isinstance(tree["base"], dict) or tree["base"].get("kind") not in ("debian", "image"):
        raise InputError(f"{what}: base must be an object of kind debian or image")
    conflicts = tree["conflicts"]
    if not isinstance(conflicts, list) or not all(isinstance(text, str) for text in conflicts):
        raise InputError(f"{what}: conflicts must be a list of texts")
    platforms = tree["platforms"]
    if not isinstance(platforms, dict) or not platforms:
        raise InputError(f"{what}: platforms must be an object with at least one platform")
    for platform, entry in platforms.items():
        where = f"{what}: platforms.{platform[:40]}"
        if not PLATFORM.match(platform) or not isinstance(entry, dict):
            raise InputError(f"{where}: is not a platform such as linux/arm64")
        _keys(entry, _PLATFORM_FIELDS, where)
        if entry["base"] is not None and not isinstance(entry["base"], dict):
            raise InputError(f"{where}: base must be an object or null")
        _packages(entry["debian"], _DEBIAN, f"{where}.debian")
        _packages(entry["python"], _PYTHON, f"{where}.python")
        requirements = entry["requirements"]
        if not isinstance(requirements, dict):
            raise InputError(f"{where}: requirements must be an object of file names and hashes")
        for file in requirements:
            _match(requirements, file, _SHA256, f"{where}.requirements")
    return ImageLock(tree)


_PYTHON = {"file": _FILE, "name": _NAME, "sha256": _SHA256, "version": _TEXT}
_DEBIAN = {**_PYTHON, "architecture": _NAME}


def _packages(found: Any, fields: Mapping[str, re.Pattern[str]], where: str) -> None:
    if not isinstance(found, list):
        raise InputError(f"{where}: must be a list of packages")
    sized = fields is _DEBIAN
    seen = set()
    for number, entry in enumerate(found):
        at = f"{where}.{number}"
        if not isinstance(entry, dict):
            raise InputError(f"{at}: must be an object")
        _keys(entry, set(fields) | ({"size_bytes"} if sized else set()), at)
        for key, pattern in fields.items():
            _match(entry, key, pattern, at)
        size = entry.get("size_bytes", 0)
        if type(size) is not int or size < 0:
            raise InputError(f"{at}: size_bytes must be a number of bytes, not {_shown(size)}")
        if entry["name"] in seen:
            raise InputError(f"{at}: {entry['name']} stands twice")
        seen.add(entry["name"])


def _keys(tree: Mapping[str, Any], expected: set[str], where: str) -> None:
    for key in sorted(set(tree) ^ expected):
        raise InputError(f"{where}: {'unknown' if key in tree else 'missing'} field {key[:60]!r}")


def _match(tree: Mapping[str, Any], key: str, pattern: re.Pattern[str], where: str) -> None:
    value = tree[key]
    if not isinstance(value, str) or not pattern.match(value):
        raise InputError(f"{where}: {key[:60]} {_shown(value)} is not what it should be")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def stale(lock: ImageLock, definition: Definition, root: Path) -> list[str]:
    """What the lock was not resolved from, one line each: definition, platforms, requirements below `root`."""
    tree, found = lock.tree, []
    if (tree["family"], tree["version"]) != (definition.family, definition.version):
        found.append(f"it is the lock of {lock.name}, the definition is {definition.name}")
    elif tree["definition_digest"] != f"sha256:{definition.digest}":
        found.append("the definition has changed since")
    if lock.platforms != sorted(definition.platforms):
        found.append(f"it holds {', '.join(lock.platforms)}, the definition {', '.join(sorted(definition.platforms))}")
        return found
    for platform in lock.platforms:
        pinned = tree["platforms"][platform]["requirements"]
        for file in sorted({*pinned, *definition.requirements[platform], definition.installer}):
            path = root / file
            if file not in pinned:
                found.append(f"{platform}: it was not resolved from {file}")
            elif not path.is_file():
                found.append(f"{platform}: {file} is not there")
            elif file_sha256(path) != pinned[file]:
                found.append(f"{platform}: {file} has changed since")
    return found + [text for platform in lock.platforms for text in _unmet(lock, platform, root)]


def _unmet(lock: ImageLock, platform: str, root: Path) -> list[str]:
    """Our own direct dependencies that neither the lock nor its base meets."""
    from packaging.specifiers import SpecifierSet

    provided = lock.tree["base"].get("provides", {})
    pinned = {one.name: one.version for one in lock.python(platform)}
    found = []
    for name, specifier in sorted(bounds(root / "pyproject.toml").items()):
        if name == "python" or name in provided:
            continue
        if name not in pinned:
            found.append(f"{platform}: apertus-nemo wants {name}, which it does not hold")
        elif not SpecifierSet(specifier).contains(pinned[name], prereleases=True):
            found.append(f"{platform}: apertus-nemo wants {name} {specifier}, it holds {pinned[name]}")
    return found


def differences(old: ImageLock, new: ImageLock) -> list[str]:
    """What differs between two locks, one line a field or package; [] for equal ones."""
    return _differences(_by_name(old.tree), _by_name(new.tree), "")


def _by_name(value: Any) -> Any:
    """Lists of packages as objects by name, so that one more package is one difference."""
    if isinstance(value, Mapping):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        return {item["name"]: {key: part for key, part in item.items() if key != "name"} for item in value}
    return value


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if old == new:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping) and not is_unknown(old) and not is_unknown(new):
        if "version" in old and "version" in new and "sha256" in old:
            return [
                f"{path}: {old['version']} -> {new['version']}"
                + (" (another file)" if old["version"] == new["version"] else "")
            ]
        found = []
        for key in sorted({*old, *new}):
            below = f"{path}.{key}" if path else str(key)
            found += _differences(old.get(key), new.get(key), below)
        return found
    return [f"{path}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping) and "version" in value:
        return str(value["version"])
    return _shown(value) if not isinstance(value, str) else value[:80]
