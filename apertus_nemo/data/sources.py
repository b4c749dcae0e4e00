"""The inputs of a corpus: found, opened through fsspec, unpacked, and cut into documents.

    sources = find(["texts/*.txt", "s3://bucket/part.jsonl.gz"])
    for document in Reader(sources[0], text_key="text"): ...

A text file is one document; a JSONL file holds one a line. The bytes as stored are hashed while they
are read. No name or message ever holds an URL's credentials, query or fragment.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar

from apertus_nemo.errors import InputError
from apertus_nemo.record.urls import without_credentials

FORMATS = ("text", "jsonl")
_UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_CANNOT_UNPACK = (".zst", ".lz4", ".snappy", ".zip", ".7z", ".tar", ".tgz", ".parquet")
_BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 64 << 20  # unpacked; a tokenizer wants about a hundred bytes for each token of a document at once
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One input file."""

    name: str  # for the manifest: relative, or an URL without credentials
    label: str  # for messages: as the user typed it, without credentials
    format: str  # "text" or "jsonl"
    open: Callable[[], IO[bytes]]  # the bytes as stored
    size_bytes: int | None = None  # as stored; None when it is not known beforehand
    remote: bool = False


def find(inputs: Sequence[str], *, format: str | None = None) -> list[Source]:
    """The files that the inputs name, in the order given; those of one glob sorted by name.

    Args:
        inputs: local paths, globs (`*`, `?`, `[...]`, `**`), or fsspec URLs.
        format: "text" or "jsonl"; None: by each file's name.

    Raises:
        InputError: a name that matches nothing, is a folder, is given twice, or cannot be read here.
    """
    found: list[tuple[str, Any, str]] = []  # (label, file system or None, path)
    for text in inputs:
        found += _find_remote(text) if _is_remote(text) else _find_local(text)
    if not found:
        raise InputError("no input: name at least one file")
    local = [os.path.abspath(path) for _, system, path in found if system is None]
    common = os.path.commonpath([os.path.dirname(path) for path in local]) if local else ""
    sources: dict[tuple[bool, str], Source] = {}
    for label, system, path in found:
        key = (system is None, os.path.realpath(path) if system is None else label)
        if key in sources:
            raise InputError(f"{label} is named twice: give each file once")
        name = os.path.relpath(os.path.abspath(path), common) if system is None else label
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{label!a}: its name is not UTF-8: rename it") from None
        stem = _stem(name)
        packed = name.lower().endswith(_CANNOT_UNPACK)
        if packed:
            raise InputError(f"{label}: this kind of file cannot be read; give plain text, JSONL, .gz, .bz2 or .xz")
        kind = format or ("jsonl" if stem.endswith((".jsonl", ".ndjson")) else "text")
        sources[key] = Source(name, label, kind, _opener(system, path), _size(system, path), system is not None)
    return list(sources.values())


class RowReader(ABC, Generic[T]):
    """What one source holds, in order; `size_bytes` and `sha256` are known once all is read.

    Raises (while iterating):
        InputError: missing, empty, truncated, not UTF-8, or a bad line; file, line and byte are named.
    """

    def __init__(self, source: Source, *, text_key: str) -> None:
        """`text_key`: the key of a JSONL record that is read."""
        self.source = source
        self.text_key = text_key
        self.size_bytes = 0  # read so far, as stored
        self.sha256 = ""
        self.empty_documents = 0

    @abstractmethod
    def _whole(self, text: str) -> T:
        """What a file of plain text holds."""

    @abstractmethod
    def _take(self, record: dict[str, Any], where: str) -> T | None:
        """What a record holds, which has `text_key`; None: nothing, it is left out. `where`: ", line 3" or the like."""

    def __iter__(self) -> Iterator[T]:
        raw = _Hashing(self._guard(self.source.open))
        try:
            packed = io.BufferedReader(raw, _BLOCK_BYTES)
            unpack = next((make for suffix, make in _UNPACK.items() if self.source.name.lower().endswith(suffix)), None)
            stream = unpack(packed) if unpack else packed
            yield from self._jsonl(raw, stream) if self.source.format == "jsonl" else self._text(raw, stream)
            while self._guard(lambda: packed.read(_BLOCK_BYTES)):  # the hash is that of the whole file
                pass
            self.size_bytes, self.sha256 = raw.count, raw.state.hexdigest()
        finally:
            raw.close()

    def _guard(self, action: Callable[[], Any]) -> Any:
        """The action's result; what it may raise about the file becomes one clear line."""
        label = self.source.label
        try:
            return action()
        except FileNotFoundError:
            raise InputError(f"{label}: no such file") from None
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            kind = "truncated" if isinstance(error, EOFError) else "damaged"
            raise InputError(f"{label}: the compressed file is {kind}: fetch or pack it again") from None
        except OSError as error:
            # str(error) of a remote system may hold the URL with its credentials.
            reason = "" if self.source.remote else f" ({error.strerror or error})"
            raise InputError(f"{label}: cannot be read: {type(error).__name__}{reason}") from None
        except Exception as error:
            if not self.source.remote:
                raise
            raise InputError(f"{label}: cannot be read: {type(error).__name__}") from None

    def _text(self, raw: _Hashing, stream: Any) -> Iterator[T]:
        data = self._guard(lambda: stream.read(MAX_DOCUMENT_BYTES + 1))
        self._check_size(data, "")
        self.size_bytes = raw.count
        if not data:
            raise InputError(f"{self.source.label} is empty: leave it out")
        yield self._whole(self._decode(data, 0, ""))

    def _jsonl(self, raw: _Hashing, stream: Any) -> Iterator[T]:
        offset = number = documents = 0
        while line := self._guard(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1)):
            number += 1
            self._check_size(line, f", line {number}")
            if line.strip():
                documents += 1
                found = self._record(self._decode(line, offset, f", line {number}"), f", line {number}")
                self.size_bytes = raw.count
                if found is not None:
                    yield found
                else:
                    self.empty_documents += 1
            offset += len(line)
        if not documents:
            raise InputError(f"{self.source.label} is empty: leave it out")

    def _check_size(self, data: bytes, where: str) -> None:
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{self.source.label}{where}: a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB: cut it into "
                "several, for example as JSONL, one a line"
            )

    def _decode(self, data: bytes, offset: int, where: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.source.label}{where}: not UTF-8 at byte {offset + error.start} "
                f"(0x{data[error.start]:02x}): convert the file to UTF-8"
            ) from None

    def _record(self, line: str, number: str) -> T | None:
        where = f"{self.source.label}{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
            raise InputError(f"{where}: not JSON ({reason}): every line must be one JSON object") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: not a JSON object: every line must be one JSON object")
        if self.text_key not in record:
            raise InputError(f"{where}: no key {self.text_key!r}: name the right one with --text-key")
        return self._take(record, number)

    def _check_text(self, text: str, where: str, what: str) -> None:
        """Refuse what JSON can say and UTF-8 cannot."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: {what} holds half of a surrogate pair: repair the line") from None


class Reader(RowReader[str]):
    """The documents of one source."""

    def __init__(self, source: Source, *, text_key: str = "text") -> None:
        super().__init__(source, text_key=text_key)

    def _whole(self, text: str) -> str:
        return text

    def _take(self, record: dict[str, Any], where: str) -> str | None:
        where, text = f"{self.source.label}{where}", record[self.text_key]
        if not isinstance(text, str):
            raise InputError(f"{where}: {self.text_key!r} is {type(text).__name__}, not a string")
        self._check_text(text, where, repr(self.text_key))
        return text or None


class _Hashing(io.RawIOBase):
    """A stream that hashes and counts what is read through it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.state = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        self.state.update(data)
        self.count += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def _stem(name: str) -> str:
    """The lowercase name without the suffix of its compression."""
    name = name.lower()
    return next((name[: -len(suffix)] for suffix in _UNPACK if name.endswith(suffix)), name)


def _is_remote(text: str) -> bool:
    return "::" in text or ("://" in text and not text.startswith(("file://", "local://")))


def _find_local(text: str) -> list[tuple[str, Any, str]]:
    import glob

    path = re.sub(r"^(file|local)://", "", text)
    if os.path.lexists(path) or not glob.has_magic(path):
        matches = [path]
    else:
        matches = sorted(match for match in glob.glob(path, recursive=True) if not os.path.isdir(match))
        if not matches:
            raise InputError(f"{text}: no file matches")
    for match in matches:
        if os.path.isdir(match):
            raise InputError(f"{match} is a folder: name its files, for example {os.path.join(match, '*.txt')}")
        if not os.path.exists(match):
            raise InputError(f"{match}: no such file")
    return [(match, None, match) for match in matches]


def _find_remote(text: str) -> list[tuple[str, Any, str]]:
    label = without_credentials(text)
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(text)
        magic = "*" if text.startswith(("http://", "https://")) else "*?["
        if not any(character in path for character in magic):
            return [(label, system, path)]
        matches = sorted(system.glob(path))
    except Exception as error:
        reason = f" ({error})" if isinstance(error, ImportError) else ""
        raise InputError(f"{label}: cannot be reached: {type(error).__name__}{reason}") from None
    if not matches:
        raise InputError(f"{label}: no file matches")
    return [(without_credentials(system.unstrip_protocol(match)), system, match) for match in matches]


def _opener(system: Any, path: str) -> Callable[[], IO[bytes]]:
    if system is None:
        return lambda: open(path, "rb", buffering=0)
    return lambda: system.open(path, "rb")


def _size(system: Any, path: str) -> int | None:
    if system is not None:
        return None
    try:
        return os.stat(path).st_size
    except OSError:
        return None
