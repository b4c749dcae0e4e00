"""A file system of a few MiB that is really full when it is full: a tmpfs in a mount namespace of its own.

    with small_disk(tmp_path / "disk", size_bytes=2**22) as disk:
        disk.folder            # a path that every process of this user can use
        disk.fill(); disk.free()

A helper process holds the namespace, and the path leads through it: when the helper is gone, so is the disk, however
the test ends. Needs root, or namespaces for users; `pytest.skip` says so where there are none.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_SCRIPT = """
mount -t tmpfs -o size="$1" tmpfs "$2" && echo done
while read -r mode; do mount -o "remount,$mode" "$2" && echo done; done
"""


@dataclass(frozen=True)
class SmallDisk:
    """A small file system."""

    folder: Path  # for processes of this user
    mount_point: Path  # the same for a command that begins with `inside`
    helper: subprocess.Popen[bytes]

    @property
    def inside(self) -> list[str]:
        """Start of a command that runs where the file system is mounted."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self.helper.pid), *user, "--mount"]

    def fill(self, *, pages: int = 0) -> None:
        """Leave no free byte, but for what is left of blocks that files have begun, and `pages` of 4 KiB."""
        fill(str(self.folder))
        if pages:
            os.truncate(ballast(str(self.folder)), ballast(str(self.folder)).stat().st_size - pages * 2**12)

    def free(self) -> None:
        """Give the space back."""
        ballast(str(self.folder)).unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written in the block."""
        self._remount("ro")
        try:
            yield
        finally:
            self._remount("rw")

    def _remount(self, mode: str) -> None:
        assert self.helper.stdin is not None
        assert self.helper.stdout is not None
        self.helper.stdin.write(f"{mode}\n".encode())
        self.helper.stdin.flush()
        assert self.helper.stdout.readline() == b"done\n"


def ballast(folder: str) -> Path:
    """The file that fills a disk."""
    return Path(folder) / "ballast"


def fill(folder: str) -> None:
    """As `SmallDisk.fill`, for processes that know the folder alone."""
    with open(ballast(folder), "ab", buffering=0) as stream:
        for size in (2**20, 2**12, 1):
            try:
                while stream.write(bytes(size)):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


@contextmanager
def small_disk(mount_point: Path, *, size_bytes: int) -> Iterator[SmallDisk]:
    """Skips the test where this user cannot mount a file system of its own."""
    mount_point.mkdir(parents=True)
    flags = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    command = ["unshare", *flags, "sh", "-c", _SCRIPT, "sh", str(size_bytes), str(mount_point)]
    try:
        helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        pytest.skip("no small file system: there is no unshare here")
    try:
        assert helper.stdout is not None
        if helper.stdout.readline() != b"done\n":
            assert helper.stderr is not None
            pytest.skip(f"no small file system: {helper.stderr.read().decode(errors='replace').strip()}")
        folder = Path(f"/proc/{helper.pid}/root{mount_point}")
        try:
            (folder / "probe").write_bytes(b"x")
            (folder / "probe").unlink()
            there = not (mount_point / "probe").exists() and os.stat(folder).st_dev != os.stat(mount_point).st_dev
        except OSError as error:
            pytest.skip(f"no small file system: its namespace cannot be entered: {error.strerror}")
        if not there:
            pytest.skip("no small file system: its namespace cannot be entered")
        yield SmallDisk(folder, mount_point, helper)
    finally:
        helper.kill()
        helper.communicate()
