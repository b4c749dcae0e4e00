"""Manifests of folders against their bytes, at the speed of hashing.

    manifest = read_manifest(data, what="checkpoints/step-000000010/manifest.json")
    for file in hash_files(folder, {"a.bin": 4711}): file.name, file.sha256, file.size_bytes

Files are read by as many threads as there are processors: hashing and reading both leave Python's lock.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import is_digest, loads_canonical
from apertus_nemo.record.files import FileEntry
from apertus_nemo.record.places import AnyPath, RemotePath, check_entry, open_binary, open_ordinary

MAX_MANIFEST_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**20
_BATCH = 64  # files that a thread takes at once
_REMOTE_WORKERS = 8


@dataclass(frozen=True)
class File:
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


def hash_files(folder: AnyPath, sizes: Mapping[str, int], *, at_most: bool = False) -> Iterator[File]:
    """SHA-256 of files below `folder`, in the order of `sizes`, which gives the size that each must have.

    `at_most`: or fewer bytes. A file of another size is read no further; it has an `error`, as one that cannot be read.
    """
    items = list(sizes.items())
    batches = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
    if len(batches) < 2:
        for batch in batches:
            yield from _hash_batch(folder, batch, at_most)
        return
    workers = min(_REMOTE_WORKERS if isinstance(folder, RemotePath) else os.cpu_count() or 1, len(batches))
    with ThreadPoolExecutor(workers) as pool:
        for files in pool.map(lambda batch: _hash_batch(folder, batch, at_most), batches):
            yield from files


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
