"""Manifests of folders against their bytes, at the speed of hashing.

    manifest = read_manifest(data, what="checkpoints/step-000000010/manifest.json")
    for file in hash_files(folder, names): file.name, file.sha256, file.size_bytes

Files are read by as many threads as there are processors: hashing and reading both leave Python's lock.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import is_digest, loads, loads_canonical
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
    tree = loads(data, what=what, max_bytes=MAX_MANIFEST_BYTES)
    # Quick for many files: of ASCII strings and integers, this is RFC 8785 too. All else takes the long way.
    if (
        not data.isascii()
        or json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False) != data.decode()
    ):
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


def hash_files(folder: AnyPath, names: Sequence[str]) -> Iterator[File]:
    """SHA-256 and size of files below `folder`, in the order of `names`; what cannot be read has an `error`."""
    batches = [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)]
    if len(batches) < 2:
        for batch in batches:
            yield from _hash_batch(folder, batch)
        return
    workers = min(_REMOTE_WORKERS if isinstance(folder, RemotePath) else os.cpu_count() or 1, len(batches))
    with ThreadPoolExecutor(workers) as pool:
        for files in pool.map(lambda batch: _hash_batch(folder, batch), batches):
            yield from files


def _hash_batch(folder: AnyPath, names: Sequence[str]) -> list[File]:
    buffer = bytearray(_BLOCK_BYTES)
    return [_hash(folder, name, buffer) for name in names]


def _hash(folder: AnyPath, name: str, buffer: bytearray) -> File:
    digest, size = hashlib.sha256(), 0
    try:
        if isinstance(folder, RemotePath):
            with open_binary(folder / name) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
            return File(name, digest.hexdigest(), size)
        descriptor = open_ordinary(f"{folder}/{name}")
        try:
            view = memoryview(buffer)
            while count := os.readv(descriptor, [buffer]):
                digest.update(view[:count])
                size += count
        finally:
            os.close(descriptor)
    except InputError as error:
        return File(name, "", size, str(error))
    except (OSError, ValueError) as error:
        return File(name, "", size, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    return File(name, digest.hexdigest(), size)
