"""Manifests of folders against their bytes, at the speed of hashing.

    manifest = read_manifest(data, what="checkpoints/step-000000010/manifest.json")
    for file in hash_files(folder, {"a.bin": 4711}): file.name, file.sha256, file.size_bytes

Large files are read by as many threads as there are processors: hashing and reading both leave Python's lock. Of small
ones the interpreter's share is larger than the hash's, so that one thread is quicker: there, every call counts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import is_digest, loads_canonical
from apertus_nemo.record.files import FileEntry
from apertus_nemo.record.places import AnyPath, RemotePath, check_entry, open_binary, open_ordinary

MAX_MANIFEST_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**20
_BATCH = 64  # files that a thread takes at once
_REMOTE_WORKERS = 8
_SMALL_BYTES = 16 * 2**10  # files that are smaller in the mean are read by one thread

# A manifest as it is written, of names that need no escape and lead nowhere else; whatever else there may be is left
# to the slow and strict reader.
_PART = rb"(?!\.{1,2}[/\"])[ !#-.0-\[\]-~]++"
_ENTRY = re.compile(
    rb'"(' + _PART + rb"(?:/" + _PART + rb')*+)":\{"sha256":"([0-9a-f]{64})","size_bytes":(0|[1-9][0-9]{0,14})\}([,}])'
)
_HEAD = b'{"files":{'
_TAIL = re.compile(rb',(?:"lock_digest":"([0-9a-f]{64})",)?"step":(0|[1-9][0-9]{0,14}),"version":1\}')


class File(NamedTuple):
    """A file that was read, or could not be."""

    name: str
    sha256: str
    size_bytes: int
    error: str = ""


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint."""

    step: int
    files: dict[str, FileEntry]
    lock_digest: str | None  # of the run; the first ones of version 1 do not name it


def read_manifest(data: bytes, *, what: str) -> Manifest:
    """The manifest of a checkpoint; raises InputError, beginning with `what`."""
    quick = _quick_manifest(data)
    return _strict_manifest(data, what) if quick is None else quick


def _quick_manifest(data: bytes) -> Manifest | None:
    """The manifest where each of its bytes is as it is written, in canonical order; else None."""
    if not data.startswith(_HEAD) or len(data) > MAX_MANIFEST_BYTES:
        return None
    files: dict[str, FileEntry] = {}
    position, before, end, match = len(_HEAD), b"", b",", _ENTRY.match
    while end == b",":
        found = match(data, position)
        if found is None:
            return None
        name, digest, size, end = found.groups()
        if name <= before:
            return None
        files[name.decode()] = {"sha256": digest.decode(), "size_bytes": int(size)}
        position, before = found.end(), name
    tail = _TAIL.fullmatch(data, position)
    if tail is None:
        return None
    return Manifest(int(tail[2]), files, None if tail[1] is None else tail[1].decode())


def _strict_manifest(data: bytes, what: str) -> Manifest:
    tree = loads_canonical(data, what=what, max_bytes=MAX_MANIFEST_BYTES)
    if not isinstance(tree, dict) or type(tree.get("version")) is not int or tree["version"] != 1:
        raise InputError(f"{what}: is not the manifest of a checkpoint of version 1")
    if type(tree.get("step")) is not int or not isinstance(tree.get("files"), dict):
        raise InputError(f"{what}: is not the manifest of a checkpoint: it names no step or no files")
    for name, entry in tree["files"].items():
        check_entry(name, entry, what=what)
    lock_digest = tree.get("lock_digest")
    if lock_digest is not None and not is_digest(lock_digest):
        raise InputError(f"{what}: names a lock digest that is none")
    return Manifest(tree["step"], tree["files"], lock_digest)


def hash_files(
    folder: AnyPath, sizes: Mapping[str, int], *, at_most: bool = False, ordinary: bool = False
) -> Iterator[File]:
    """SHA-256 of files below `folder`, in the order of `sizes`, which gives the size that each must have.

    `at_most`: or fewer bytes. A file of another size is read no further; it has an `error`, as one that cannot be read.
    `ordinary`: a listing has just said that they are ordinary files.
    """
    items = list(sizes.items())
    small = ordinary and not at_most and isinstance(folder, Path)
    if small and sum(sizes.values()) < _SMALL_BYTES * len(items):
        yield from _hash_small(str(folder), items)
        return
    batches = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
    if len(batches) < 2:
        for batch in batches:
            yield from _hash_batch(folder, batch, at_most)
        return
    workers = min(_REMOTE_WORKERS if isinstance(folder, RemotePath) else os.cpu_count() or 1, len(batches))
    with ThreadPoolExecutor(workers) as pool:
        for files in pool.map(lambda batch: _hash_batch(folder, batch, at_most), batches):
            yield from files


def _hash_small(folder: str, items: Sequence[tuple[str, int]]) -> Iterator[File]:
    """As `_hash`, with as few calls a file as can be: whatever is not as it should be is left to that."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    opened, read, close, sha256 = os.open, os.read, os.close, hashlib.sha256
    try:
        root = opened(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        root = -1
    try:
        for name, size in items:
            data = b""
            if root >= 0 and size <= _BLOCK_BYTES:
                try:
                    descriptor = opened(name, flags, dir_fd=root)
                    try:
                        data = read(descriptor, size + 1)
                    finally:
                        close(descriptor)
                except (OSError, ValueError):
                    data = b""
            if len(data) == size > 0:
                yield File(name, sha256(data).hexdigest(), size)
            else:
                yield _hash(Path(folder), name, size, False, bytearray(min(_BLOCK_BYTES, size + 1)))
    finally:
        if root >= 0:
            close(root)


def _hash_batch(folder: AnyPath, items: Sequence[tuple[str, int]], at_most: bool) -> list[File]:
    buffer = bytearray(min(_BLOCK_BYTES, max(size for _, size in items) + 1))
    return [_hash(folder, name, size, at_most, buffer) for name, size in items]


def _hash(folder: AnyPath, name: str, size: int, at_most: bool, buffer: bytearray) -> File:
    digest, count = hashlib.sha256(), 0
    try:
        if isinstance(folder, RemotePath):
            with open_binary(folder / name) as stream:
                while count <= size and (block := stream.read(_BLOCK_BYTES)):
                    digest.update(block)
                    count += len(block)
        else:
            descriptor = open_ordinary(f"{folder}/{name}")
            try:
                count = os.fstat(descriptor).st_size
                if count <= size and (count == size or at_most):
                    count = 0
                    view = memoryview(buffer)
                    while count <= size and (length := os.readv(descriptor, [buffer])):
                        digest.update(view[:length])
                        count += length
            finally:
                os.close(descriptor)
    except InputError as error:
        return File(name, "", count, str(error))
    except (OSError, ValueError) as error:
        return File(name, "", count, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if count > size and at_most:
        return File(name, "", count, f"has more than {size} bytes")
    if count != size and not at_most:
        much = f"{count}" if not isinstance(folder, RemotePath) or count < size else "more"
        return File(name, "", count, f"has {much} bytes, not {size}")
    return File(name, digest.hexdigest(), count)
