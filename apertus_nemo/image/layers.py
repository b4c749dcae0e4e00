"""A stored layer as the entries of its tar archive: decompressed and hashed as it is read, never unpacked.

    with open_layer(store, descriptor, "gzip", diff_id=...) as layer:
        for entry in layer.entries():          # tarfile.TarInfo, checked
            data = layer.data(entry)           # a file to read, before the next entry
    # at the end of the block: every byte was as its digests say, or Differs

A layer comes from anywhere. Its headers are read up to a bound, names and numbers are checked, and what does not parse
is an error and not the end of the archive. What a name means in an image is decided in `merge`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from apertus_nemo.errors import Differs, InputError
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.oci import Descriptor
from apertus_nemo.record.files import reading

MAX_HEADER_BYTES = 4 * 2**20  # of one entry: extended headers, long names, the map of a sparse file
MAX_PATH_BYTES = 4096
MAX_NAME_BYTES = 255  # of one part of a path
MAX_DEPTH = 400  # parts of a path
MAX_ID = 2**32 - 1
MAX_FILE_BYTES = 2**43  # a sparse file may claim any size

_BLOCK_BYTES = 2**20
_XATTR = "SCHILY.xattr."


class CorruptBlob(Differs):
    """A stored blob is not what its digest says."""

    def __init__(self, message: str, digest: str) -> None:
        super().__init__(message)
        self.digest = digest


class _Entry(tarfile.TarInfo):
    """An entry; a header that cannot be read is an error anywhere, not just at the beginning."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise InputError(str(error)) from None


class Layer:
    """One layer that is being read."""

    def __init__(self, what: str, stream: _Forward) -> None:
        self._what, self._stream = what, stream
        self._archive: tarfile.TarFile | None = None

    def entries(self) -> Iterator[tarfile.TarInfo]:
        """Every entry, checked; raises InputError for what cannot be one."""
        number = 0
        while True:
            self._stream.budget = MAX_HEADER_BYTES
            try:
                entry = self._next()
                if entry is not None:
                    _check(entry)
            except (InputError, tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
                reason = "its headers are nested too deep" if isinstance(error, RecursionError) else str(error)
                raise InputError(f"{self._what}: entry {number + 1} cannot be read: {_printable(reason)}") from None
            self._stream.budget = None
            if entry is None:
                return
            number += 1
            yield entry

    def _next(self) -> tarfile.TarInfo | None:
        if self._archive is None:
            # Opening reads the first header.
            self._archive = tarfile.TarFile(
                fileobj=self._stream,
                tarinfo=_Entry,
                encoding="utf-8",
                errors="surrogateescape",
            )
        entry = self._archive.next()
        self._archive.members = []  # type: ignore[attr-defined] # it keeps all of them otherwise
        return entry

    def data(self, entry: tarfile.TarInfo) -> IO[bytes]:
        """The content of a regular file, holes of sparse ones filled."""
        assert self._archive is not None
        stream = self._archive.extractfile(entry)
        assert stream is not None
        return stream


@contextlib.contextmanager
def open_layer(
    store: BlobStore, descriptor: Descriptor, compression: str, *, diff_id: str | None, what: str
) -> Iterator[Layer]:
    """Read a layer of the store from its beginning to its end.

    When the block ends well, what is left is read too; raises CorruptBlob where the stored bytes are not those of
    the descriptor, and Differs where the uncompressed ones are not those of `diff_id` (None: not looked at).
    """
    path = store.path(descriptor.digest)
    with reading(path), open(path, "rb", buffering=0) as file:
        stored = _Hashed(file)
        stream = _Forward(_decompressed(stored, compression), hashed=diff_id is not None)
        try:
            yield Layer(what, stream)
            stream.skip_rest()
        except InputError as error:
            stored.drain()
            _check_stored(stored, descriptor, path)  # a damaged file is the better explanation
            raise error if str(error).startswith("layer ") else InputError(f"{what}: {error}") from None
        stored.drain()
        _check_stored(stored, descriptor, path)
        if diff_id is not None and stream.digest() != diff_id:
            raise Differs(f"{what}: uncompressed its digest is {stream.digest()}, the configuration says {diff_id}")


def _check_stored(stored: _Hashed, descriptor: Descriptor, path: Path) -> None:
    if (stored.size, stored.digest()) != (descriptor.size_bytes, descriptor.digest):
        raise CorruptBlob(
            f"{path}: its bytes are not those of its name: it was changed; remove it and pull again", descriptor.digest
        )


class _Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def read(self, size: int = _BLOCK_BYTES) -> bytes:
        block = self._file.read(size)
        self._hash.update(block)
        self.size += len(block)
        return block

    def drain(self) -> None:
        while self.read():
            pass

    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


def _decompressed(stored: _Hashed, compression: str) -> Iterator[bytes]:
    if compression == "gzip":
        return _gunzip(stored)
    if compression == "zstd":
        return _unzstd(stored)
    return iter(lambda: stored.read(_BLOCK_BYTES), b"")


def _gunzip(stored: _Hashed) -> Iterator[bytes]:
    """Members of gzip one after the other; zeros may follow the last."""
    engine, pending, begun = zlib.decompressobj(31), b"", False
    while True:
        if not pending:
            pending = stored.read()
        if not begun:
            pending = pending.lstrip(b"\0") if stored.size > len(pending) else pending
            if not pending:
                if block := stored.read():
                    pending = block
                    continue
                return
        ended = not pending
        try:
            block = engine.decompress(pending, _BLOCK_BYTES)
        except zlib.error as error:
            raise InputError(f"it is not gzip: {error}") from None
        begun = True
        if block:
            yield block
        if engine.eof:
            pending, engine, begun = engine.unused_data, zlib.decompressobj(31), False
            continue
        pending = engine.unconsumed_tail
        if ended and not block:
            raise InputError("its gzip stream ends early")


def _unzstd(stored: _Hashed) -> Iterator[bytes]:
    import zstandard

    engine = zstandard.ZstdDecompressor()  # refuses windows of more than 128 MiB
    try:
        with engine.stream_reader(stored, read_size=_BLOCK_BYTES, read_across_frames=True, closefd=False) as stream:  # type: ignore[arg-type]
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except zstandard.ZstdError as error:
        raise InputError(f"it is not zstd: {error}") from None


class _Forward(io.RawIOBase):
    """Blocks as a file that only goes forward; what a header may read is bounded by `budget`."""

    def __init__(self, blocks: Iterator[bytes], *, hashed: bool) -> None:
        self._blocks, self._block, self._at = blocks, b"", 0
        self._position = 0
        self._hash = hashlib.sha256() if hashed else None
        self.budget: int | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def _more(self) -> bool:
        """Another block; False at the end."""
        block = next(self._blocks, b"")
        if self._hash is not None:
            self._hash.update(block)
        self._block, self._at = block, 0
        return bool(block)

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise InputError("a size is negative")
        if self.budget is not None:
            self.budget -= size
            if self.budget < 0:
                raise InputError(f"its header has more than {MAX_HEADER_BYTES} bytes")
        if size <= len(self._block) - self._at:  # most of the time
            found = self._block[self._at : self._at + size]
            self._at += size
        else:
            parts, missing = [], size
            while missing and (self._at < len(self._block) or self._more()):
                part = self._block[self._at : self._at + missing]
                parts.append(part)
                self._at += len(part)
                missing -= len(part)
            found = b"".join(parts)
        self._position += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 0 or offset < self._position:
            raise InputError("its sizes lead back to what was read already")
        missing = offset - self._position
        while missing and (self._at < len(self._block) or self._more()):
            step = min(missing, len(self._block) - self._at)
            self._at += step
            missing -= step
        self._position = offset - missing
        return self._position

    def skip_rest(self) -> None:
        """Read to the end; only zeros may follow the end of an archive."""
        rest = memoryview(self._block)[self._at :]
        while True:
            if any(rest):
                raise InputError("something follows the end of its archive")
            if not self._more():
                return
            rest = memoryview(self._block)

    def digest(self) -> str:
        assert self._hash is not None
        return f"sha256:{self._hash.hexdigest()}"


def _check(entry: tarfile.TarInfo) -> None:
    """Refuse numbers and names that no file system has."""
    if not 0 <= entry.size <= MAX_FILE_BYTES:
        raise InputError(f"its size {entry.size} is not one of a file")
    for label, value in (("owner", entry.uid), ("group", entry.gid)):
        if not 0 <= value <= MAX_ID:
            raise InputError(f"its {label} {value} is not a number of a user or group")
    for label, text in (("name", entry.name), ("target", entry.linkname)):
        if "\0" in text:
            raise InputError(f"its {label} holds a zero byte")
        if len(encoded(text)) > MAX_PATH_BYTES:
            raise InputError(f"its {label} has more than {MAX_PATH_BYTES} bytes")


def encoded(text: str) -> bytes:
    """A name as the bytes that stood in the archive."""
    return text.encode("utf-8", "surrogateescape")


def mtime_of(entry: tarfile.TarInfo) -> int:
    """Seconds that squashfs can hold: 32 bits, without a sign."""
    value = float(entry.mtime)
    return 0 if math.isnan(value) else int(min(max(value, 0.0), float(MAX_ID)))


def xattrs_of(entry: tarfile.TarInfo) -> dict[str, str]:
    """Extended attributes that squashfs can hold; not those by which overlayfs marks its own files."""
    return {
        key.removeprefix(_XATTR): value
        for key, value in entry.pax_headers.items()
        if key.startswith((f"{_XATTR}user.", f"{_XATTR}trusted.", f"{_XATTR}security."))
        and not key.startswith((f"{_XATTR}trusted.overlay.", f"{_XATTR}user.overlay."))
    }


def _printable(text: str) -> str:
    text = text[:300]
    return text if text.isprintable() else ascii(text)[1:-1]
