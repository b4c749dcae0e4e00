"""Where a record lies: a folder on this machine, or a copy behind an fsspec URL; read alike.

    place = locate("runs/a")                        # a pathlib.Path
    place = locate("s3://bucket/runs/a")            # a RemotePath, listed by the copy's manifest
    with open_binary(place / "lock.json") as stream: ...
    names(place / "states")

A copy is whole when it has `copy.json`, which is uploaded last and names every file with its size and SHA-256
(docs/record.md). What it does not name is not there. fsspec is imported for URLs only. Nothing but ordinary files is
opened, so a record from elsewhere cannot make a reader follow links or wait for a pipe. No message holds an URL's
credentials or query.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.record.canonical import dumps, is_digest, loads_canonical, sha256_hex
from apertus_nemo.record.files import FileEntry
from apertus_nemo.record.urls import is_url, local_path, without_credentials

COPY = "copy.json"  # manifest of a copy
REPORT = "report.html"  # for reading: made from a record, and no part of it or of its copies
COPY_FORMAT = 1
COPY_KIND = "apertus-nemo copy"
MAX_COPY_BYTES = 64 * 2**20

MAX_SHOWN = 500  # characters of one finding

_BLOCK_BYTES = 2**20
_T = TypeVar("_T")


class RemotePath:
    """A file or folder of a copy; has those of `pathlib.Path`'s methods that reading a record takes."""

    def __init__(self, copy: RemoteCopy, parts: tuple[str, ...] = ()) -> None:
        self.copy = copy
        self.parts = parts

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.copy, (*self.parts, *name.split("/")))

    def __str__(self) -> str:
        return "/".join((self.copy.label, *self.parts))

    @property
    def name(self) -> str:
        """The last part."""
        return self.parts[-1] if self.parts else self.copy.label.rpartition("/")[2]

    @property
    def inside(self) -> str:
        """The name within the copy."""
        return "/".join(self.parts)

    def is_file(self) -> bool:
        """The copy's manifest names this file."""
        return self.inside in self.copy.files

    def is_dir(self) -> bool:
        """The copy's manifest names a file below it."""
        return not self.parts or self.inside in self.copy.folders

    def exists(self) -> bool:
        """Either."""
        return self.is_file() or self.is_dir()


AnyPath = Path | RemotePath


class RemoteCopy:
    """A whole copy behind an URL: its manifest, and how its files are opened."""

    def __init__(self, url: str) -> None:
        """Raises InputError where there is no whole copy, UnfitEnvironment where the place cannot be reached."""
        self.label = without_credentials(url).rstrip("/")
        self.system, root = file_system(url)
        self.root = root.rstrip("/")
        data = self.guard(COPY, lambda: self._read(COPY))
        self.manifest_digest = sha256_hex(data)
        self.files = manifest_from_bytes(data, what=f"{self.label}/{COPY}")
        self.folders: dict[str, set[str]] = {"": set()}  # folder -> names in it
        for name in self.files:
            parts = name.split("/")
            for depth, part in enumerate(parts):
                self.folders.setdefault("/".join(parts[:depth]), set()).add(part)

    def open(self, name: str) -> IO[bytes]:
        """A stream over a file's bytes, as they are now; not yet held against the manifest."""
        raw = self.guard(name, lambda: self.system.open(self.path(name), "rb"))
        return io.BufferedReader(_Guarded(self, name, raw), _BLOCK_BYTES)

    def listing(self) -> list[str] | None:
        """Names of what lies there, listed or not; None where the place cannot say."""
        if self.system.protocol in (("http", "https"), "http", "https"):
            return None
        with reaching(self.label):
            found = self.system.find(self.root)
        start = self.system._strip_protocol(self.root).rstrip("/") + "/"
        return sorted(path.removeprefix(start) for path in map(str, found) if not path.endswith("/"))

    def path(self, name: str) -> str:
        """A file's name in fsspec."""
        return f"{self.root}/{name}"

    def _read(self, name: str) -> bytes:
        with self.system.open(self.path(name), "rb") as stream:
            data: bytes = stream.read(MAX_COPY_BYTES + 1)
        return data

    def guard(self, name: str, action: Callable[[], _T]) -> _T:
        """The action's result; what fsspec may raise becomes one clear line without the URL's secrets."""
        missing = f"{self.label} holds no whole copy of a run: there is no {COPY}" if name == COPY else None
        with reaching(f"{self.label}/{name}", missing=missing):
            return action()


class _Guarded(io.RawIOBase):
    """A stream whose errors are ours."""

    def __init__(self, copy: RemoteCopy, name: str, inner: Any) -> None:
        self._copy, self._name, self._inner = copy, name, inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._copy.guard(self._name, lambda: self._inner.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


@contextmanager
def reaching(label: str, *, missing: str | None = None) -> Iterator[None]:
    """Turn whatever a file system behind an URL raises into one line; `missing` in place of "does not exist"."""
    try:
        yield
    except (InputError, UnfitEnvironment):
        raise
    except FileNotFoundError:
        raise InputError(missing or f"{label} does not exist") from None
    except NotADirectoryError:
        raise InputError(missing or f"{label} does not exist") from None
    except ImportError as error:
        raise UnfitEnvironment(f"{label}: the package {error.name or ''} for this kind of URL is missing") from None
    except Exception as error:  # every back end has its own; their texts may hold keys and signed URLs
        raise UnfitEnvironment(f"{label}: cannot be reached: {type(error).__name__}") from None


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of an URL. Raises UnfitEnvironment where there is none."""
    label = without_credentials(url)
    with reaching(label):
        import fsspec
        from fsspec.core import url_to_fs

        scheme = url.split("://", 1)[0].split("::")[0].lower()
        if scheme not in fsspec.available_protocols():
            raise InputError(f"{label}: {scheme} is no kind of URL that fsspec knows")
        try:
            system, path = url_to_fs(url)
        except ImportError as error:
            hint = "; install apertus-nemo[s3]" if scheme in ("s3", "s3a") else ""
            needed = (
                (error.__cause__.name if isinstance(error.__cause__, ImportError) else None) or error.name or scheme
            )
            raise UnfitEnvironment(f"{label}: the package for {scheme} URLs is missing ({needed}){hint}") from None
    return system, path


def locate(text: str | Path) -> AnyPath:
    """A path, or the copy behind an URL (file:// is a path). A trailing "/" means nothing."""
    if isinstance(text, Path) or not is_url(text):
        return Path(text)
    local = local_path(text)
    return Path(local) if local is not None else RemotePath(RemoteCopy(text))


def open_binary(path: AnyPath) -> IO[bytes]:
    """An ordinary file, opened for reading. Raises OSError (local) or our own errors (remote)."""
    if isinstance(path, RemotePath):
        if not path.is_file():
            raise InputError(f"{path} does not exist")
        return path.copy.open(path.inside)
    return open(open_ordinary(path), "rb")


def open_ordinary(path: Path | str) -> int:
    """A descriptor of a local file for reading. Raises OSError, also for a link; InputError for a pipe and the like."""
    # Without O_NONBLOCK opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not an ordinary file")
    return descriptor


def names(folder: AnyPath) -> list[str]:
    """Names in a folder, in no order; none where there is no such folder. Raises OSError or our own errors."""
    if isinstance(folder, RemotePath):
        return list(folder.copy.folders.get(folder.inside, ()))
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def files_below(folder: AnyPath) -> tuple[list[str], list[str]]:
    """(ordinary files, anything that is neither a file nor a folder), by their path below `folder`, sorted.

    Raises InputError where a folder cannot be read.
    """
    if isinstance(folder, RemotePath):
        start = folder.inside + "/" if folder.parts else ""
        return sorted(name[len(start) :] for name in folder.copy.files if name.startswith(start)), []
    ordinary: list[str] = []
    others: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(f"{folder}/{prefix}") as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{prefix}{entry.name}/")
                    else:
                        (ordinary if entry.is_file(follow_symlinks=False) else others).append(prefix + entry.name)
        except OSError as error:
            raise InputError(f"could not read {folder}/{prefix}: {error.strerror or error}") from error
    return sorted(ordinary), sorted(others)


def read(path: AnyPath, *, max_bytes: int) -> bytes:
    """A file's bytes. Raises InputError where it cannot be read or has more than `max_bytes`."""
    try:
        with open_binary(path) as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"could not read {path}: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise InputError(f"{path} has more than the {max_bytes} bytes that are read")
    return data


def manifest_to_bytes(files: dict[str, FileEntry]) -> bytes:
    """`copy.json`: canonical JSON."""
    return dumps({"files": files, "format": COPY_FORMAT, "kind": COPY_KIND})


def manifest_from_bytes(data: bytes, *, what: str) -> dict[str, FileEntry]:
    """The files that a `copy.json` names; raises InputError, beginning with `what`."""
    tree = loads_canonical(data, what=what, max_bytes=MAX_COPY_BYTES)
    if not isinstance(tree, dict) or tree.get("kind") != COPY_KIND:
        raise InputError(f"{what}: is not the manifest of a copy")
    if tree.get("format") != COPY_FORMAT:
        raise InputError(f"{what}: has format {str(tree.get('format'))[:40]}; this version reads {COPY_FORMAT}")
    if set(tree) != {"files", "format", "kind"} or not isinstance(tree["files"], dict):
        raise InputError(f"{what}: is not the manifest of a copy")
    files = tree["files"]
    for name, entry in files.items():
        check_entry(name, entry, what=what)
    for name in files:
        parent = name.rpartition("/")[0]
        while parent:
            if parent in files:
                raise InputError(f"{what}: {parent!r} is both a file and a folder")
            parent = parent.rpartition("/")[0]
    return files


_ENTRY = {"sha256", "size_bytes"}


def check_entry(name: str, entry: object, *, what: str) -> None:
    """Refuse, with InputError, a manifest's line that is none, or whose name leads out of the folder."""
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(f"{what}: {name[:200]!r} is not the name of a file in this folder")
    if (
        not isinstance(entry, dict)
        or set(entry) != _ENTRY
        or not is_digest(entry["sha256"])
        or type(entry["size_bytes"]) is not int
        or entry["size_bytes"] < 0
    ):
        raise InputError(f"{what}: {name[:200]!r} has no SHA-256 and size")


def printable(text: str) -> str:
    """A text of a record for the terminal, cut where it is long: one that comes from anywhere must not drive it."""
    if len(text) > MAX_SHOWN:
        text = text[: MAX_SHOWN - 4] + " ..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
