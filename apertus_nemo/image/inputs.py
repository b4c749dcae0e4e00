"""What an image is built from: every .deb and every Python file that a lock names, fetched, each byte checked.

    inputs = fetch(lock, "linux/amd64", python_version="3.11", cache=cache, archives=find_archives())
    inputs.debs, inputs.python            # paths, in the lock's order

Files are kept by their hashes, so nothing is fetched twice, and a build that finds all of them needs no network.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.image import debian, python_packages
from apertus_nemo.image.debian import DebianPackage
from apertus_nemo.image.lock import ImageLock
from apertus_nemo.image.python_packages import PythonPackage
from apertus_nemo.record.files import file_sha256

_AT_ONCE = 4  # files that are hashed


@dataclass(frozen=True)
class Inputs:
    """The files of one platform."""

    debs: tuple[Path, ...]
    python: tuple[tuple[PythonPackage, Path], ...]

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return sum(path.stat().st_size for path in (*self.debs, *(path for _, path in self.python)))


def absent(lock: ImageLock, platform: str, cache: Path) -> tuple[list[DebianPackage], list[PythonPackage]]:
    """What would have to be fetched. A file of the cache that is not what its name says is removed from it."""

    def has_deb(one: DebianPackage) -> bool:
        return _whole(cache / "debian" / f"{one.sha256}.deb", one.sha256)

    def has_file(one: PythonPackage) -> bool:
        path = cache / "python" / one.sha256 / one.file
        if not path.exists():
            return False
        if not _whole(path, one.sha256):
            shutil.rmtree(path.parent, ignore_errors=True)
            return False
        return True

    debs, files = lock.debian(platform), lock.python(platform)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        debs = [one for one, there in zip(debs, pool.map(has_deb, debs), strict=True) if not there]
        files = [one for one, there in zip(files, pool.map(has_file, files), strict=True) if not there]
    return debs, files


def _whole(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def fetch(
    lock: ImageLock,
    platform: str,
    *,
    python_version: str,
    cache: Path,
    archives: Callable[[], Mapping[str, str]],
    say: Callable[[str], None],
) -> Inputs:
    """All files of a platform; `archives` is asked only where a .deb is not in the cache.

    Raises UnfitEnvironment that names what cannot be had.
    """
    debs, files = absent(lock, platform, cache)
    if debs:
        size = sum(one.size_bytes for one in debs)
        say(f"fetching {len(debs)} Debian packages, {size / 2**20:.0f} MiB")
    found = debian.fetch(lock.debian(platform), archives() if debs else {}, cache / "debian")
    if files:
        say(f"fetching {len(files)} Python packages")
    python = lock.python(platform)
    paths = python_packages.fetch(python, cache / "python", platform=platform, python_version=python_version)
    if files:
        absent(lock, platform, cache)  # what pip gave was checked as it came; this holds what is on disk against it
        paths = python_packages.fetch(python, cache / "python", platform=platform, python_version=python_version)
    return Inputs(tuple(found), tuple(zip(python, paths, strict=True)))
