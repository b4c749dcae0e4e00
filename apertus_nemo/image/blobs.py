"""Blobs by their content: `blobs/sha256/<hex>` below a folder, as in an OCI image layout and in the cache of pulls.

    store = BlobStore(cache)
    store.read(descriptor, max_bytes=...)     # checked: size and SHA-256
    store.write(data, media_type)             # Descriptor
    store.check(descriptor)                   # every byte of a large one

A blob has its name only when it is whole: it is written beside and renamed. Two writers of the same blob write the same
bytes, so either may win.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from apertus_nemo.errors import Differs, InputError
from apertus_nemo.image.oci import Descriptor
from apertus_nemo.record.files import read_bytes, reading, write_atomic, writing

_BLOCK_BYTES = 2**20


class BlobStore:
    """A folder of blobs."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        algorithm, _, name = digest.partition(":")
        return self.root / "blobs" / algorithm / name

    def has(self, descriptor: Descriptor) -> bool:
        """Whether a blob of that digest and size is there; its bytes are not looked at."""
        try:
            return self.path(descriptor.digest).stat().st_size == descriptor.size_bytes
        except OSError:
            return False

    def read(self, descriptor: Descriptor, *, max_bytes: int) -> bytes:
        """A small blob's bytes, checked.

        Raises InputError where it is missing or larger than `max_bytes`, Differs where it is not what its descriptor
        says.
        """
        path = self.path(descriptor.digest)
        if descriptor.size_bytes > max_bytes:
            raise InputError(f"{path}: has {descriptor.size_bytes} bytes, more than the {max_bytes} that are read")
        data = read_bytes(path, max_bytes=max_bytes)
        if len(data) != descriptor.size_bytes:
            raise Differs(f"{path}: has {len(data)} bytes, its descriptor says {descriptor.size_bytes}")
        if hashlib.sha256(data).hexdigest() != path.name:
            raise Differs(f"{path}: its bytes are not those of its name: it was changed")
        return data

    def write(self, data: bytes, media_type: str) -> Descriptor:
        """Keep `data`; raises UnfitEnvironment where the disk does not allow it."""
        descriptor = Descriptor.of(data, media_type)
        path = self.path(descriptor.digest)
        if not self.has(descriptor):
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
        return descriptor

    def check(self, descriptor: Descriptor) -> None:
        """Read every byte of a blob of any size; raises as `read` does."""
        path = self.path(descriptor.digest)
        digest, size = hashlib.sha256(), 0
        with reading(path), open(path, "rb", buffering=0) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
        if size != descriptor.size_bytes:
            raise Differs(f"{path}: has {size} bytes, its descriptor says {descriptor.size_bytes}")
        if digest.hexdigest() != path.name:
            raise Differs(f"{path}: its bytes are not those of its name: it was changed")

    def remove(self, digest: str) -> None:
        """Forget a blob; quietly nothing where it is not there."""
        try:
            os.unlink(self.path(digest))
        except OSError:
            pass
