"""A file that is complete or absent, and hashed while it is written.

with HashedFile(path) as file:
    file.write(data)
file.sha256
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from apertus_nemo.errors import ApertusError
from apertus_nemo.record.files import sync_folder, writing

_PART_BYTES = 1 << 24  # of one write
_SMALL_BYTES = 1 << 16  # not worth a thread
_PENDING = 2  # calls that wait


class HashedFile:
    """Written beside its place, and renamed when the block ends; nothing is left of it when that fails."""

    def __init__(self, path: Path) -> None:
        """Raises UnfitEnvironment where the disk does not allow it."""
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._hash = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")
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
        self._hashing.shutdown()
        with writing(self._path):
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._partial.rename(self._path)
            sync_folder(self._path.parent)

    def drop(self) -> None:
        """Give up: close and remove it."""
        self._hashing.shutdown()
        self._stream.close()
        self._partial.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of all that was written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """All of it, written while another thread hashes it; the number of bytes."""
        view = memoryview(data).cast("B")
        count = len(view)
        hashed = self._hashing.submit(self._hash.update, view) if count > _SMALL_BYTES else None
        try:
            if hashed is None:
                self._hash.update(view)
            with writing(self._partial):
                while view:
                    view = view[self._stream.write(view[:_PART_BYTES]) :]
        except ApertusError as error:
            self.failed = error
            raise
        finally:
            if hashed is not None:
                hashed.result()
        self.size_bytes += count
        return count

    def flush(self) -> None:
        """Nothing is buffered; torch's writer asks for it."""


class Behind:
    """Calls in order, by a thread of their own, while the caller reads what comes next; what one raises is raised here.

    with Behind(shard.write) as write:
        write(name, block)
    """

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[Future[object]] = deque()

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        while kind is None and self._pending:
            self._pending.popleft().result()

    def __call__(self, *arguments: object) -> None:
        """Returns before it is done, where few calls wait."""
        self._pending.append(self._pool.submit(self._call, *arguments))
        while len(self._pending) > _PENDING or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
