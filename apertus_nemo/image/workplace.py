"""Folders in which something is made: held by a lock of the kernel's, removed at the end, and swept up after a kill.

with workplace(cache, ".build-") as work:
    ...
check_free(work, 4 * 2**30, "building cpu-1.0.0")
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.record.files import writing

_LOCK = "lock"


@contextmanager
def workplace(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder below `parent` that is gone afterwards; those that a killed process has left go, too.

    Raises UnfitEnvironment where the disk refuses.
    """
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        gate = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(gate, fcntl.LOCK_EX)  # a folder is never seen before it is held
            _sweep(parent, prefix)
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
            held = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(held, fcntl.LOCK_EX)
        finally:
            os.close(gate)
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        _remove(folder)
        os.close(held)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the folders that nobody holds."""
    for folder in sorted(parent.glob(f"{prefix}*")):
        try:
            held = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            _remove(folder)
        finally:
            os.close(held)


def _remove(folder: Path) -> None:
    """With what is in it, its lock last, so that what is left of it can be swept up the next time."""
    for entry in sorted(folder.iterdir() if folder.is_dir() else ()):
        if entry.name != _LOCK:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(OSError):
                    entry.unlink()
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {_LOCK}:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(folder: Path, wanted_bytes: int, what: str) -> None:
    """Raise UnfitEnvironment where the disk of `folder` has less free than `wanted_bytes`."""
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes:
        raise UnfitEnvironment(
            f"{what} wants {wanted_bytes / 2**30:.1f} GiB below {folder}, where {free / 2**30:.1f} GiB are free: "
            "free some space, or give another folder with --cache"
        )
