"""Python packages of an image: one file with one hash for each, chosen from hashed requirements, and fetched.

    packages = choose(requirements, platform="linux/arm64", python_version="3.11", source_only=["wget"])
    folder = fetch(packages, cache, platform=..., python_version=...)     # pip, wherever it is configured to look
    text = resolve_below(pyproject, provided, ...)                        # requirements of an image that has a base

Requirements list the hashes of every file of a version; an image is built from one of them. uv knows the files' names,
and pip fetches: no registry's host stands in a lock.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.programs import run
from apertus_nemo.record.files import file_sha256, writing

MACHINES = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.+!_-]+)\Z")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})\Z")
_GLIBC = range(28, 16, -1)  # manylinux_2_28 and older: Debian 12 and Ubuntu 24.04 have newer ones


@dataclass(frozen=True)
class Requirement:
    """A version, and the SHA-256 of every file that it may be."""

    name: str  # normalised
    version: str
    sha256: tuple[str, ...]


@dataclass(frozen=True, order=True)
class PythonPackage:
    """The one file that an image is built from."""

    name: str
    version: str
    file: str  # a wheel, or a source archive
    sha256: str


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_requirements(text: str, *, what: str) -> list[Requirement]:
    """Read a hashed lock as uv and pip write it; raises InputError for what is not pinned and hashed."""
    found: dict[str, Requirement] = {}
    joined = re.sub(r"\\\r?\n", " ", re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE))
    for line in joined.splitlines():
        words = line.split()
        if not words:
            continue
        pin, hashes = _PIN.match(words[0]), [_HASH.match(word) for word in words[1:]]
        if pin is None or not hashes or None in hashes:
            raise InputError(f"{what}: {words[0][:80]!r} is not a version pinned with hashes")
        name = normal(pin[1])
        if name in found:
            raise InputError(f"{what}: {name} stands twice")
        found[name] = Requirement(name, pin[2], tuple(sorted(match[1] for match in hashes if match)))
    return list(found.values())


def choose(
    requirements: Sequence[Requirement],
    *,
    platform: str,
    python_version: str,
    source_only: Iterable[str],
    cache: Path,
    work: Path,
) -> list[PythonPackage]:
    """The file of each requirement that suits the platform best, sorted.

    Raises UnfitEnvironment where the index cannot be asked, InputError that names what has no suitable file.
    """
    # A version with a local part is on no index that uv reads: pip fetches its one file, and says what it is called.
    local = [one for one in requirements if "+" in one.version]
    listed = _ask_index([one for one in requirements if "+" not in one.version], platform, python_version, work)
    tags = _tags(platform, python_version)
    found, missing = [], []
    for one in requirements:
        if one in local:
            found.append(_by_fetching(one, cache, platform, python_version))
            continue
        files = [file for file in listed.get(one.name, []) if file[1] in one.sha256]
        wheels = [(tags[tag], file) for file in files for tag in _tags_of(file[0]) if tag in tags]
        if one.name in source_only:
            sources = [file for file in files if not file[0].endswith(".whl")]
            best = sources[0] if sources else None
        else:
            best = min(wheels)[1] if wheels else None
        if best is None:
            missing.append(
                f"{one.name}=={one.version}: no file that was locked suits {platform}, Python {python_version}"
            )
        else:
            found.append(PythonPackage(one.name, one.version, *best))
    if missing:
        raise InputError("\n".join(missing))
    return sorted(found)


def _ask_index(
    requirements: Sequence[Requirement], platform: str, python_version: str, work: Path
) -> dict[str, list[tuple[str, str]]]:
    """name -> [(file, SHA-256)] of every file of these versions, as the index lists them."""
    import tomllib

    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        (folder / "in.txt").write_text("".join(f"{one.name}=={one.version}\n" for one in requirements))
        command = [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-config",
            "--no-python-downloads",
            "--no-deps",
            "--format",
            "pylock.toml",
        ]
        command += ["--python-platform", f"{MACHINES[platform]}-manylinux_2_28", "--python-version", python_version]
        run(
            [*command, "--output-file", "pylock.toml", "in.txt"],
            what="asking for the files of Python packages",
            folder=folder,
            limit_s=600,
        )
        tree = tomllib.loads((folder / "pylock.toml").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {normal(entry["name"]): list(_files_of(entry)) for entry in tree.get("packages", [])}


def _files_of(entry: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    from urllib.parse import unquote

    for file in [*entry.get("wheels", []), *([entry["sdist"]] if "sdist" in entry else [])]:
        name = file.get("name") or unquote(str(file.get("url", file.get("path", ""))).rsplit("/", 1)[-1])
        if "sha256" in file.get("hashes", {}):
            yield name, file["hashes"]["sha256"]


def _tags(platform: str, python_version: str) -> dict[str, int]:
    """Compatibility tag -> rank, best first (PEP 425, PEP 600), for CPython on glibc 2.28 or newer."""
    from packaging.tags import compatible_tags, cpython_tags

    machine = MACHINES[platform]
    platforms = []
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    for minor in _GLIBC if machine == "aarch64" else range(28, 4, -1):
        platforms.append(f"manylinux_2_{minor}_{machine}")
        if minor in legacy:
            platforms.append(f"{legacy[minor]}_{machine}")
    platforms.append(f"linux_{machine}")
    version = tuple(int(part) for part in python_version.split("."))
    interpreter = "cp" + "".join(map(str, version))
    every = [*cpython_tags(version, platforms=platforms), *compatible_tags(version, interpreter, platforms)]
    ranks: dict[str, int] = {}
    for rank, tag in enumerate(every):
        ranks.setdefault(str(tag), rank)
    return ranks


def _tags_of(file: str) -> list[str]:
    """The tags that the name of a wheel carries; none for another file."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        return sorted(map(str, parse_wheel_filename(file)[3])) if file.endswith(".whl") else []
    except InvalidWheelFilename:
        return []


def _by_fetching(one: Requirement, cache: Path, platform: str, python_version: str) -> PythonPackage:
    if len(one.sha256) != 1:
        raise InputError(f"{one.name}=={one.version} must be pinned by one hash: it is on no ordinary index")
    unnamed = PythonPackage(one.name, one.version, "", one.sha256[0])
    path = fetch([unnamed], cache, platform=platform, python_version=python_version)[0]
    return PythonPackage(one.name, one.version, path.name, one.sha256[0])


def fetch(packages: Sequence[PythonPackage], cache: Path, *, platform: str, python_version: str) -> list[Path]:
    """The files of packages, in their order, from `cache` or through pip; every one checked against its hash.

    Raises UnfitEnvironment with pip's words where one cannot be had.
    """
    absent = [one for one in packages if _kept(one, cache) is None]
    for wheels in (True, False):
        wanted = [one for one in absent if (one.file.endswith(".whl") or not one.file) is wheels]
        if wanted:
            _pip_download(wanted, cache, platform, python_version, wheels=wheels)
    found = [_kept(one, cache) for one in packages]
    for one, path in zip(packages, found, strict=True):
        if path is None:
            raise UnfitEnvironment(f"pip did not fetch {one.name}=={one.version} with sha256 {one.sha256}")
    return [path for path in found if path is not None]


def _kept(one: PythonPackage, cache: Path) -> Path | None:
    """A file in the cache: in a folder that is named by its hash, and checked when it was put there."""
    try:
        names = sorted(os.listdir(cache / one.sha256))
    except OSError:
        return None
    names = [name for name in names if name == one.file or not one.file]
    return cache / one.sha256 / names[0] if names else None


def _pip_download(
    wanted: Sequence[PythonPackage], cache: Path, platform: str, python_version: str, *, wheels: bool
) -> None:
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=cache, prefix=".download-"))
    try:
        listed = folder / "wanted.txt"
        listed.write_text("".join(f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n" for one in wanted))
        command: list[str | Path] = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        command += ["--no-input", "--no-deps", "--require-hashes", "--dest", folder / "files", "-r", listed]
        if wheels:
            machine = MACHINES[platform]
            command += ["--only-binary", ":all:", "--python-version", python_version, "--implementation", "cp"]
            for name in [*(f"manylinux_2_{minor}_{machine}" for minor in _GLIBC), f"manylinux2014_{machine}"]:
                command += ["--platform", name]
            if machine == "x86_64":
                for name in ("manylinux_2_12", "manylinux2010", "manylinux_2_5", "manylinux1"):
                    command += ["--platform", f"{name}_{machine}"]
            command += ["--platform", f"linux_{machine}"]
        else:
            command += ["--no-build-isolation", "--no-binary", ",".join(one.name for one in wanted)]
        run(command, what="fetching Python packages", limit_s=3600)
        by_hash = {file_sha256(path): path for path in sorted((folder / "files").iterdir())}
        for one in wanted:
            if one.sha256 in by_hash:
                with writing(cache):
                    (cache / one.sha256).mkdir(exist_ok=True)
                    os.replace(by_hash[one.sha256], cache / one.sha256 / by_hash[one.sha256].name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def resolve_below(
    pyproject: Path,
    provided: Iterable[str],
    *,
    constraints: Mapping[str, str],
    like: Path,
    platform: str,
    python_version: str,
    source_only: Iterable[str],
    work: Path,
) -> str:
    """Hashed requirements of our package on a base that provides some: those are neither resolved nor listed.

    `constraints` are the base's versions, exact; `like` are requirements of another image, whose versions are kept
    where they fit. Raises UnfitEnvironment with uv's words where nothing fits.
    """
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        # An override whose marker is never true takes a package out of the resolution.
        (folder / "overrides.txt").write_text("".join(f"{name} ; python_version < '0'\n" for name in sorted(provided)))
        fixed = dict(constraints)
        (folder / "constraints.txt").write_text("".join(f"{name}=={fixed[name]}\n" for name in sorted(fixed)))
        shutil.copyfile(pyproject, folder / "pyproject.toml")
        kept = [
            f"{one.name}=={one.version}\n"
            for one in parse_requirements(like.read_text(), what=str(like))
            if one.name not in fixed
        ]
        (folder / "out.txt").write_text("".join(kept))  # uv prefers what its output held before
        command = [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-config",
            "--no-python-downloads",
            "--generate-hashes",
            "--no-emit-index-url",
        ]
        command += ["--no-emit-find-links", "--no-annotate", "--custom-compile-command", "apertus-nemo image lock"]
        command += ["--python-platform", f"{MACHINES[platform]}-manylinux_2_28", "--python-version", python_version]
        command += ["--only-binary", ":all:", *(part for name in source_only for part in ("--no-binary", name))]
        command += ["--override", "overrides.txt", "--constraint", "constraints.txt", "--output-file", "out.txt"]
        run([*command, "pyproject.toml"], what="resolving Python packages", folder=folder, limit_s=600)
        return (folder / "out.txt").read_text()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bounds(pyproject: Path) -> dict[str, str]:
    """Name -> version specifier of our own direct dependencies, and "python" for Python's."""
    import tomllib

    from packaging.requirements import Requirement as Parsed

    project = tomllib.loads(pyproject.read_text())["project"]
    found = {"python": str(project["requires-python"])}
    for text in project["dependencies"]:
        parsed = Parsed(text)
        found[normal(parsed.name)] = str(parsed.specifier)
    return found
