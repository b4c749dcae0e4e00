"""A file that is complete or absent, and hashed while it is written.

with HashedFile(path) as file:
    file.write(data)
file.sha256
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

from apertus_nemo.errors import ApertusError
from apertus_nemo.record.files import sync_folder, writing

_PART_BYTES = 1 << 24  # of one write


class HashedFile:
    """Written beside its place, and renamed when the block ends; nothing is left of it when that fails."""

    def __init__(self, path: Path) -> None:
        """Raises UnfitEnvironment where the disk does not allow it."""
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._hash = hashlib.sha256()
        self.size_bytes = 0  # written so far
        self.failed: ApertusError | None = None  # what a write met, for callers behind code that hides it
        with writing(self._partial):
            self._stream = self._partial.open("wb", buffering=0)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.drop()
            return
        with writing(self._path):
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._partial.rename(self._path)
            sync_folder(self._path.parent)

    def drop(self) -> None:
        """Give up: close and remove it."""
        self._stream.close()
        self._partial.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of all that was written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """All of it; the number of bytes."""
        view = memoryview(data).cast("B")
        count = len(view)
        try:
            with writing(self._partial):
                while view:
                    part = view[:_PART_BYTES]
                    self._hash.update(part)
                    view = view[len(part) :]
                    while part:
                        part = part[self._stream.write(part) :]
        except ApertusError as error:
            self.failed = error
            raise
        self.size_bytes += count
        return count

    def flush(self) -> None:
        """Nothing is buffered; torch's writer asks for it."""
