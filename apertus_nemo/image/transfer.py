"""Blobs from a registry into a store: resumed where they broke off, several at once, each by one process only.

A blob grows as `partial/<hex>` beside the blobs, under a lock of the kernel's: of two pulls that want it, one fetches
and the other waits. Every byte is hashed as it comes; a blob gets its name when size and SHA-256 are those of its
descriptor. What an interrupted pull leaves is hashed again and gone on from.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from apertus_nemo.errors import Differs
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.oci import Descriptor
from apertus_nemo.image.registry_http import Again, Answer, Ask, Interrupted, Session
from apertus_nemo.record.files import sync_folder, writing

Progress = Callable[[str, int], None]  # digest of a blob, bytes of it so far

_BLOCK_BYTES = 2**20
_WAIT_S = 0.2


def no_progress(digest: str, size_bytes: int) -> None:
    """Say nothing."""


def parallel(session: Session, tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks at the same time; the first that fails ends the others, and its error leaves."""
    if not tasks:
        return
    with ThreadPoolExecutor(max_workers=min(session.limits.jobs, len(tasks))) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            if any(_failed(future) for future in futures if future.done()):
                session.stop.set()
        except BaseException:
            session.stop.set()
            raise
        finally:
            if session.stop.is_set():
                for future in futures:
                    future.cancel()
    session.stop.clear()
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):
        raise error


def _failed(future: Future[None]) -> bool:
    return not future.cancelled() and future.exception() is not None


def download(session: Session, descriptor: Descriptor, store: BlobStore, progress: Progress = no_progress) -> None:
    """Have a blob in `store`. Raises Differs where the registry sends other bytes than the digest names."""
    target = store.path(descriptor.digest)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        (store.root / "partial").mkdir(parents=True, exist_ok=True)
    with _partial(store.root / "partial" / target.name, session) as (partial, stream):
        if store.has(descriptor):  # another pull was first
            progress(descriptor.digest, descriptor.size_bytes)
            return
        _fill(session, descriptor, stream, target, progress)
        with writing(target):
            os.fsync(stream.fileno())
            os.rename(partial, target)
            sync_folder(target.parent)


@contextlib.contextmanager
def _partial(path: Path, session: Session) -> Iterator[tuple[Path, IO[bytes]]]:
    """The file of a blob that is on its way, held against other pulls; of a failed one it stays, to be gone on from."""
    shared = True
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with open(descriptor, "r+b", buffering=0) as stream:
            if shared and not _hold(stream, session):  # no locks on this file system: a file of our own
                shared, path = False, path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
                continue
            if not _is_named(stream, path):  # the pull that we waited for has renamed it
                continue
            try:
                yield path, stream
            except BaseException:
                if not shared:
                    os.unlink(path)
                raise
            if _is_named(stream, path):  # it was not needed after all
                os.unlink(path)
            return


def _hold(stream: IO[bytes], session: Session) -> bool:
    """Wait for the lock of an open file; False where the file system has none."""
    while True:
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if session.stop.wait(_WAIT_S):
                raise Interrupted("stopped") from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                return False
            raise


def _is_named(stream: IO[bytes], path: Path) -> bool:
    try:
        found, held = os.stat(path), os.fstat(stream.fileno())
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _fill(session: Session, descriptor: Descriptor, stream: IO[bytes], target: Path, progress: Progress) -> None:
    """Fetch what is missing; a blob that was gone on from and came out wrong is fetched once more from the start."""
    what = f"{session.registry}/{session.repository}@{descriptor.digest}"
    body = _Body(descriptor, stream, target, session, progress)
    resumed = body.size > 0
    while True:
        if body.size < descriptor.size_bytes or descriptor.size_bytes == 0:
            session.call(
                Ask(
                    "GET",
                    session.url(f"blobs/{descriptor.digest}"),
                    scope="pull",
                    expect=(200, 206, 416),
                    handle=body.take,
                    headers=lambda: {"Range": f"bytes={body.size}-"} if body.size else {},
                    position=lambda: body.size,
                    what=what,
                )
            )
        if body.size == descriptor.size_bytes and body.digest.hexdigest() == target.name:
            return
        found = f"sha256:{body.digest.hexdigest()}, {body.size} bytes"
        body.begin()
        if not resumed:
            raise Differs(f"{what}: the registry sends other bytes ({found}; expected {descriptor.size_bytes} bytes)")
        resumed = False


class _Body:
    """What has come of a blob, hashed."""

    def __init__(
        self, descriptor: Descriptor, stream: IO[bytes], target: Path, session: Session, progress: Progress
    ) -> None:
        self._descriptor, self._stream, self._target = descriptor, stream, target
        self._session, self._progress = session, progress
        self.size, self.digest = 0, hashlib.sha256()
        stream.seek(0)
        while block := stream.read(_BLOCK_BYTES):
            self.digest.update(block)
            self.size += len(block)
        if self.size > descriptor.size_bytes:
            self.begin()

    def begin(self) -> None:
        """Forget what is there."""
        with writing(self._target):
            self._stream.seek(0)
            self._stream.truncate()
        self.size, self.digest = 0, hashlib.sha256()

    def take(self, answer: Answer) -> None:
        """Append an answer's body, or take it from the start where the server does not go on."""
        total = self._descriptor.size_bytes
        if answer.status == 416 or (
            answer.status == 206 and not answer.header("Content-Range").startswith(f"bytes {self.size}-")
        ):
            self.begin()
            raise Again("does not go on where it was asked to")
        if answer.status == 200 and self.size:
            self.begin()
        for block in answer.blocks(total - self.size):
            if self._session.stop.is_set():
                raise Interrupted("stopped")
            with writing(self._target):
                view = memoryview(block)
                while view:
                    written = self._stream.write(view)
                    view = view[written:]
            self.digest.update(block)
            self.size += len(block)
            self._progress(self._descriptor.digest, self.size)
        if self.size < total:
            raise Again(f"sent {self.size} of {total} bytes")
