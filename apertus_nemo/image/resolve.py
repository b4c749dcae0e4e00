"""Resolves a definition into a lock: Debian packages by apt, Python packages by uv and pip, the base by its registry.

    lock = resolve(definition, root, debian_mirror=None, base_packages=None, cache=cache)

Needs a network. `root` is the checkout that holds the requirements; where they are resolved below a base, they are
written there too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.image import debian, python_packages
from apertus_nemo.image.base_image import Look, look_at_base, read_packages
from apertus_nemo.image.definition import Definition
from apertus_nemo.image.lock import ImageLock, make_lock, platform_entry
from apertus_nemo.image.python_packages import MACHINES, Requirement, bounds, parse_requirements
from apertus_nemo.record.canonical import unknown
from apertus_nemo.record.files import file_sha256, write_atomic, writing, writing_for_others

STACK = "requirements/linux-{machine}.txt"  # the versions that are tested on CPUs; images on a base keep them


def resolve(
    definition: Definition,
    root: Path,
    *,
    cache: Path,
    look: Look,
    debian_mirror: str | None = None,
    base_packages: Path | None = None,
    write: bool = True,
) -> ImageLock:
    """The lock of `definition`, from what mirrors, index and registry have now.

    `look` asks the registry of a base (`base_image.from_registry`); `base_packages` is what `pip list --format json`
    printed inside the base. With `write`, requirements that are resolved below a base are written below `root`;
    without, nothing is. Raises what the parts raise.
    """
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with writing_for_others(cache), tempfile.TemporaryDirectory(dir=cache, prefix=".lock-") as folder:
        work = Path(folder)
        if definition.base.kind == "debian":
            return _on_debian(definition, root, work, cache, debian_mirror)
        return _on_image(definition, root, work, cache, look, base_packages, write)


def _on_debian(definition: Definition, root: Path, work: Path, cache: Path, mirror: str | None) -> ImageLock:
    suites = definition.base.suites
    archives = debian.find_archives() if mirror is None else debian.archives_below(mirror, suites)
    keyring = debian.KEYRING if mirror is None or debian.KEYRING.is_file() else None
    platforms = {}
    for platform in definition.platforms:
        packages = debian.resolve(
            definition.debian_packages, suites, platform.rpartition("/")[2], archives, work=work, keyring=keyring
        )
        requirements = _read_requirements(definition, platform, root)
        python = _files(definition, platform, requirements, cache, work)
        platforms[platform] = platform_entry(
            base=None, debian=packages, python=python, requirements=_hashes(definition, platform, root)
        )
    base = {"kind": "debian", "release": definition.base.release}
    return make_lock(definition, base=base, platforms=platforms, conflicts=[])


def _on_image(
    definition: Definition, root: Path, work: Path, cache: Path, look: Look, base_packages: Path | None, write: bool
) -> ImageLock:
    base = definition.base
    provides, fixed = _provided(definition, base_packages)
    looked = look_at_base(base, definition.platforms, look=look)
    conflicts = [*looked.conflicts, *_conflicts(definition, root, provides)]
    platforms = {}
    for platform in definition.platforms:
        text = python_packages.resolve_below(
            root / "pyproject.toml",
            provides,
            constraints=fixed,
            like=root / STACK.format(machine=MACHINES[platform]),
            platform=platform,
            python_version=definition.python_version,
            source_only=definition.source_only,
            work=work,
        )
        (file,) = definition.requirements[platform]
        target = root / file if write else work / "requirements.txt"
        write_atomic(target, text.encode())
        requirements = [*parse_requirements(text, what=file), *_installer(definition, root)]
        hashes = {file: file_sha256(target), definition.installer: file_sha256(root / definition.installer)}
        platforms[platform] = platform_entry(
            base=looked.platforms[platform],
            debian=[],
            python=_files(definition, platform, requirements, cache, work),
            requirements=hashes,
        )
    tree: dict[str, Any] = {
        "digest": base.digest,
        "digest_is_of": looked.digest_is_of,
        "environment": looked.environment,
        "kind": "image",
        "licence": base.licence,
        "provides": provides,
        "reference": base.reference,
    }
    if base_packages is None:
        tree["packages"] = unknown(
            "the base's own list of Python packages was not given: inside the base, `pip list --format json`, "
            "then `image lock --base-packages FILE`"
        )
    return make_lock(definition, base=tree, platforms=platforms, conflicts=conflicts)


def _provided(definition: Definition, path: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """(what the lock says that the base provides, exact versions as constraints)."""
    named = dict(definition.base.provides)
    listed = {} if path is None else read_packages(path)
    provides: dict[str, Any] = {}
    for name, one in named.items():
        if path is not None and name not in listed:
            raise InputError(f"{path}: lists no {name}, which the base is said to provide")
        found = listed.get(name, one.version)
        if one.version is not None and found is not None and not found.startswith(one.version):
            raise InputError(f"{path}: the base has {name} {found}, the definition says {one.version}")
        provides[name] = unknown("no list of the base's packages was given") if found is None else found
    # Everything else that the base has is kept at its version, and stays the base's.
    for name, found in listed.items():
        provides.setdefault(name, found)
    return provides, {name: found for name, found in listed.items() if "+" not in found}


def _conflicts(definition: Definition, root: Path, provides: Mapping[str, Any]) -> list[str]:
    """What we ask for and the base has otherwise."""
    from packaging.specifiers import SpecifierSet

    counts_as = {name: one.counts_as for name, one in definition.base.provides}
    wanted = bounds(root / "pyproject.toml")
    has = {name: found for name, found in provides.items() if isinstance(found, str)}
    has["python"] = definition.python_version
    found = []
    for name, specifier in sorted(wanted.items()):
        version = counts_as.get(name) or has.get(name)
        if name in has and version and not SpecifierSet(specifier).contains(version, prereleases=True):
            found.append(f"apertus-nemo wants {name} {specifier}, the base has {has[name]}")
    return found


def _installer(definition: Definition, root: Path) -> list[Requirement]:
    """pip and setuptools, by which the rest is installed."""
    path = root / definition.installer
    found = parse_requirements(path.read_text(), what=str(path))
    return [one for one in found if one.name in INSTALLERS]


INSTALLERS = ("pip", "setuptools")


def _read_requirements(definition: Definition, platform: str, root: Path) -> list[Requirement]:
    """Of every file, no package twice."""
    found: dict[str, Requirement] = {}
    for file in definition.requirements[platform]:
        path = root / file
        if not path.is_file():
            raise InputError(f"{path} is not there, which the definition of {definition.family} names")
        for one in parse_requirements(path.read_text(), what=file):
            if found.setdefault(one.name, one) != one:
                raise InputError(f"{file}: pins {one.name} otherwise than another file of {definition.family}")
    for one in _installer(definition, root):
        found.setdefault(one.name, one)
    return list(found.values())


def _hashes(definition: Definition, platform: str, root: Path) -> dict[str, str]:
    return {file: file_sha256(root / file) for file in (*definition.requirements[platform], definition.installer)}


def _files(
    definition: Definition, platform: str, requirements: list[Requirement], cache: Path, work: Path
) -> list[python_packages.PythonPackage]:
    unique = {one.name: one for one in requirements}
    return python_packages.choose(
        list(unique.values()),
        platform=platform,
        python_version=definition.python_version,
        source_only=definition.source_only,
        cache=cache / "python",
        work=work,
    )
