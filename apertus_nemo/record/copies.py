"""Copies of records: pushed to a folder or an fsspec URL, and pulled back; whole or absent.

    push(Path("runs/a"), "s3://bucket/runs/a")         # Copied(files=..., size_bytes=..., digest=...)
    pull("s3://bucket/runs/a", Path("runs/a-again"))

Every file is hashed while it travels. Behind an URL the manifest, `copy.json`, is uploaded last, and without it nothing
is taken for a copy; a folder of this machine is made beside its place and renamed. No URL is recorded anywhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from apertus_nemo.errors import Differs, InputError, UnfitEnvironment
from apertus_nemo.record.canonical import sha256_hex
from apertus_nemo.record.files import FileEntry, reading, sync_folder, write_atomic, writing
from apertus_nemo.record.places import (
    COPY,
    MAX_COPY_BYTES,
    REPORT,
    RemoteCopy,
    file_system,
    files_below,
    manifest_from_bytes,
    manifest_to_bytes,
    open_binary,
    reaching,
    read,
)
from apertus_nemo.record.urls import is_url, local_path, without_credentials

_BLOCK_BYTES = 2**20
_PARTIAL = ".partial"
_CURVES = "logs/"  # no part of a record; some tools keep links there
_PROTOCOLS_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "az"}  # making one would make a bucket

Progress = Callable[[str, int], None]  # name of a file, bytes copied so far in all


@dataclass(frozen=True)
class Copied:
    """What was copied."""

    place: str  # without credentials
    files: int
    size_bytes: int
    digest: str  # SHA-256 of copy.json


def _no_progress(name: str, size_bytes: int) -> None:
    pass


def push(run: Path, target: str, *, checkpoints: bool = True, progress: Progress = _no_progress) -> Copied:
    """Copy the run directory `run` to an URL or a folder, which must not be there; without checkpoints if so asked.

    Raises InputError where `run` is no record or the target holds something, UnfitEnvironment where a process is
    writing the run, the target cannot be reached or written, or a file changed meanwhile.
    """
    run = Path(run)
    if not run.is_dir() or not (run / "lock.json").is_file():
        raise InputError(f"{run} is not a run directory: it holds no lock.json")
    local = _local(target)
    with _still(run):
        names = _names(run, checkpoints=checkpoints)
        if local is not None:
            with _folder(local) as partial:
                return _to_folder(lambda name: open_binary(run / name), names, partial, local, None, progress)
        return _to_url(run, names, target, progress)


def pull(source: str, folder: Path, *, progress: Progress = _no_progress) -> Copied:
    """Copy a whole copy into a new folder, every file held against its manifest.

    Raises InputError where there is no whole copy or the folder exists, Differs where a file is not as it was
    pushed, UnfitEnvironment where the place cannot be reached or the disk refuses.
    """
    local = _local(source)
    opener: Callable[[str], IO[bytes]]
    if local is not None:
        file = local / COPY
        if not file.is_file():
            raise InputError(f"{local} holds no whole copy of a run: there is no {COPY}")
        data = read(file, max_bytes=MAX_COPY_BYTES)
        listed = manifest_from_bytes(data, what=str(file))
        opener, label = (lambda name: open_binary(local / name)), str(local)
    else:
        copy = RemoteCopy(source)
        listed, opener, label = copy.files, copy.open, copy.label
    if "lock.json" not in listed:
        raise InputError(f"{label}/{COPY} is of no run: it names no lock.json")
    with _folder(Path(folder)) as partial:
        return _to_folder(opener, sorted(listed), partial, Path(folder), listed, progress)


def _local(text: str) -> Path | None:
    if not is_url(text):
        return Path(text)
    path = local_path(text)
    return None if path is None else Path(path)


def _names(run: Path, *, checkpoints: bool) -> list[str]:
    """What a copy holds: every file of the record, but what a crash left, a report, and the manifest of a copy."""
    outside = (_CURVES,) if checkpoints else (_CURVES, "checkpoints/")
    found, others = files_below(run)
    for name in others:
        if not name.startswith(outside):
            raise InputError(f"{run / name} is neither a file nor a folder: a copy cannot hold it")
    return [
        name
        for name in found
        if name not in (COPY, REPORT)
        and not name.startswith(outside)
        and not any(part.endswith(_PARTIAL) for part in name.split("/"))
    ]


@contextlib.contextmanager
def _still(run: Path) -> Iterator[None]:
    """Refuse a run whose step log a process is writing, and keep others from starting to."""
    try:
        descriptor = os.open(run / "steps", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    except OSError as error:
        raise InputError(f"could not read {run / 'steps'}: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnfitEnvironment(f"{run} is being written by a process; copy it when that has ended") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that gets its name when the block ends well, and is gone otherwise."""
    if os.path.lexists(target):
        raise InputError(f"{target} is there already: choose another place")
    target = target.absolute()
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(6)}{_PARTIAL}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    try:
        yield partial
        with writing(target):
            if os.path.lexists(target):  # somebody else's, meanwhile
                raise InputError(f"{target} is there already: choose another place")
            os.rename(partial, target)
            sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _to_folder(
    opener: Callable[[str], IO[bytes]],
    names: list[str],
    partial: Path,
    target: Path,
    listed: dict[str, FileEntry] | None,
    progress: Progress,
) -> Copied:
    """Fill `partial`; against `listed` where it is given (a pull), else with a manifest of its own (a push)."""
    files: dict[str, FileEntry] = {}
    total = 0
    for name in names:
        path = partial / name
        with reading(name):
            source = opener(name)
        with source as stream, writing(target):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as output:
                entry = _pour(stream, output, name, total, progress)
                output.flush()
                os.fsync(output.fileno())
        if listed is not None and entry != listed[name]:
            raise Differs(f"{name}: is not as it was pushed: SHA-256 {entry['sha256']}, {COPY} says otherwise")
        files[name] = entry
        total += entry["size_bytes"]
    manifest = manifest_to_bytes(files)
    if listed is None:
        write_atomic(partial / COPY, manifest)
    with writing(target):
        for folder in {partial / name for name in names for name in [os.path.dirname(name)]}:
            sync_folder(folder)
    return Copied(str(target), len(files), total, sha256_hex(manifest))


def _pour(stream: IO[bytes], output: Any, name: str, total: int, progress: Progress) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        output.write(block)
        size += len(block)
        progress(name, total + size)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size)


def _to_url(run: Path, names: list[str], url: str, progress: Progress) -> Copied:
    label = without_credentials(url).rstrip("/")
    system, root = file_system(url)
    root = root.rstrip("/")
    with reaching(label):
        system.invalidate_cache()
        there = _listing(system, root)
    if COPY in there:
        raise InputError(f"{label} holds a copy already: choose another place")
    foreign = sorted(there - set(names))
    if foreign:
        raise InputError(f"{label} is not empty (it holds {foreign[0]!r}): choose another place")
    files: dict[str, FileEntry] = {}
    total = 0
    folders = not _PROTOCOLS_WITHOUT_FOLDERS & set(_protocols(system))
    begun: list[str] = []
    missing = f"{label} cannot be written: its bucket or folder does not exist"
    try:
        for name in names:
            begun.append(name)
            path = run / name
            with open_binary(path) as stream, reaching(f"{label}/{name}", missing=missing):
                before = _stamp(stream)
                if folders:
                    system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                with system.open(f"{root}/{name}", "wb") as output:
                    entry = _pour(stream, output, name, total, progress)
                if _stamp(stream) != before or entry["size_bytes"] != before[0]:
                    raise UnfitEnvironment(f"{path} changed while it was copied; copy the run when nothing writes it")
            files[name] = entry
            total += entry["size_bytes"]
        manifest = manifest_to_bytes(files)
        with reaching(f"{label}/{COPY}"), system.open(f"{root}/{COPY}", "wb") as output:
            output.write(manifest)
    except BaseException:
        with contextlib.suppress(Exception):  # what is left has no manifest, and the next push takes it up
            for name in begun:
                system.rm_file(f"{root}/{name}")
        raise
    return Copied(label, len(files), total, sha256_hex(manifest))


def _protocols(system: Any) -> tuple[str, ...]:
    protocol = system.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _stamp(stream: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def _listing(system: Any, root: str) -> set[str]:
    """Names of files below `root`; none where there is nothing."""
    try:
        found = system.find(root)
    except FileNotFoundError:
        return set()
    start = str(system._strip_protocol(root)).rstrip("/") + "/"
    return {path.removeprefix(start) for path in map(str, found) if path.startswith(start) and not path.endswith("/")}
