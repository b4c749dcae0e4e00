"""Files that are complete or absent: atomic writes, hashes, and clear errors from the disk.

write_atomic(path, data)            # after a crash: the old file, or the new one, never a part
file_sha256(path)
tree_manifest(folder)               # {"a/b.bin": {"sha256": ..., "size_bytes": ...}}, sorted
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from apertus_nemo.errors import ApertusError, InputError, UnfitEnvironment

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_REFUSED = {
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
}
_READ_BYTES = 2**20  # of one read when hashing
_PROBE_BYTES = 2**20  # a disk with less than this is full for all that a run writes


class FileEntry(TypedDict):
    """One file of a manifest."""

    sha256: str
    size_bytes: int


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into UnfitEnvironment: one line with `path`, the cause and what to do."""
    try:
        yield
    except OSError as error:
        raise _refusal(path, error.errno or 0, error.strerror or str(error)) from error


def _refusal(path: Path, code: int, reason: str) -> UnfitEnvironment:
    if code in _FULL:
        return UnfitEnvironment(f"could not write {path}: {_FULL[code]}; free some space, then run the command again")
    if code in _REFUSED:
        return UnfitEnvironment(f"could not write {path}: {_REFUSED[code]}; choose another folder or its permissions")
    return UnfitEnvironment(f"could not write {path}: {reason}")


@contextmanager
def writing_for_others(path: Path) -> Iterator[None]:
    """As `writing`, around code of others that writes below `path`, and loses the cause on the way.

    torch's C++ writers say "iostream error" of a full disk. What the disk refuses is then found by trying.
    """
    try:
        yield
    except ApertusError:
        raise
    except Exception as error:
        code = _full(error) or _refused_below(path)
        if code is None:
            raise
        raise _refusal(path, code, "") from error


def _full(error: BaseException | None) -> int | None:
    """errno of a full disk among the causes of an error; by its text where a writer was a process of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.errno
        for code in _FULL:
            if f"[Errno {code}] {os.strerror(code)}" in str(error):
                return code
        error = error.__cause__ or error.__context__
    return None


def _refused_below(path: Path) -> int | None:
    """errno of a disk that does not take a file of 1 MiB below `path`; None where it does."""
    folder = Path(path)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    probe = folder / f".probe.{os.getpid()}-{os.urandom(6).hex()}.partial"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, bytes(_PROBE_BYTES))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(probe)
    except OSError as refused:
        return refused.errno if refused.errno in _FULL or refused.errno in _REFUSED else None
    return None


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn an OSError of the block into InputError: one line with `path` and the cause."""
    try:
        yield
    except OSError as error:
        raise InputError(f"could not read {path}: {error.strerror or error}") from error


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable; quietly nothing where the file system cannot."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: temporary file beside it, fsync, rename, fsync of the folder.

    Raises UnfitEnvironment where the disk does not allow it; `path` is then what it was before.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(6).hex()}.partial")
    with writing(path):
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(partial, path)
        except BaseException:
            try:
                os.unlink(partial)
            except FileNotFoundError:
                pass
            raise
        sync_folder(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits. Raises InputError where it cannot be read."""
    digest = hashlib.sha256()
    with reading(Path(path)), open(path, "rb", buffering=0) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """A file's bytes. Raises InputError where it cannot be read or has more than `max_bytes`."""
    with reading(Path(path)), open(path, "rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InputError(f"{path} has more than the {max_bytes} bytes that are read")
    return data


def tree_manifest(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder`, by its path relative to it ("/" between parts), sorted by that path.

    Raises InputError for a link or a special file (what it means depends on the machine), for a name that
    is not UTF-8, and where something cannot be read.
    """
    found: dict[str, FileEntry] = {}
    for name in tree_names(folder):
        path = Path(folder) / name
        found[name] = FileEntry(sha256=file_sha256(path), size_bytes=path.stat().st_size)
    return found


def tree_names(folder: Path) -> list[str]:
    """The keys of `tree_manifest`, sorted; raises what it does, and reads no file."""
    folder = Path(folder)
    found: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        here = folder / prefix
        with reading(here):
            entries = list(os.scandir(here))
        for entry in entries:
            name = prefix + entry.name
            try:
                name.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(f"{folder}: the name {name!r} is not UTF-8") from error
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                pending.append(name + "/")
            elif stat.S_ISREG(mode):
                found.append(name)
            else:
                raise InputError(f"{folder / name} is neither a file nor a folder: a manifest cannot hold it")
    return sorted(found)
