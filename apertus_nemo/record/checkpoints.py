"""Which checkpoints of a run are whole: by their manifests alone, without opening what they hold.

    folder = newest_whole(run, lock_digest=lock.digest, last_logged=9, warn=print)    # None: start at step 0
    check_checkpoint(folder, lock_digest=lock.digest)                                 # raises InputError: why not

A checkpoint is `checkpoints/step-<n>/` with `manifest.json`, which is written last:

    {"files": {"weights/.metadata": {"sha256": "...", "size_bytes": 4711}, ...}, "lock_digest": "...", "step": 9,
     "version": 1}

The first checkpoints of version 1 name no lock digest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import loads_canonical, sha256_hex
from apertus_nemo.record.files import file_sha256, read_bytes, reading, tree_names
from apertus_nemo.record.run_dir import RunDirectory

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 64 * 1024 * 1024  # a line a file: ranks times writers

_THREADS = 4
_WORTH_BYTES = 2**26

_NAME = re.compile(r"step-([0-9]{9})\Z")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint. Raises InputError where `folder` is not one."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it holds no {MANIFEST}; give a folder of checkpoints/")
    tree = loads_canonical(read_bytes(path, max_bytes=MAX_MANIFEST_BYTES), what=str(path))
    if not isinstance(tree, dict) or tree.get("version") != MANIFEST_VERSION or type(tree.get("step")) is not int:
        raise InputError(f"{path} is not the manifest of a checkpoint of version {MANIFEST_VERSION}")
    return tree


def manifest_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """SHA-256 and content of the manifest of a committed checkpoint. Raises InputError where `folder` is not one."""
    tree = read_manifest(folder)
    return sha256_hex(read_bytes(folder / MANIFEST, max_bytes=MAX_MANIFEST_BYTES)), tree


def committed_steps(run: RunDirectory) -> list[int]:
    """Steps by the names of the folders in `checkpoints/`, ascending; nothing of them is read."""
    if not run.checkpoints.is_dir():
        return []
    with reading(run.checkpoints):
        return sorted(int(match[1]) for name in os.listdir(run.checkpoints) if (match := _NAME.match(name)))


def checkpoint_step(folder: Path) -> int:
    """The step whose end a committed checkpoint holds. Raises InputError where `folder` is not one."""
    step: int = read_manifest(folder)["step"]
    return step


def check_checkpoint(folder: Path, *, lock_digest: str) -> int:
    """The step of a whole checkpoint of the run with this lock: every file, and no other, has its SHA-256.

    Raises InputError, with the reason, for any other folder. Hashes every byte and interprets none of them.
    """
    tree = read_manifest(folder)
    step: int = tree["step"]
    named = _NAME.match(folder.name)
    if named is not None and int(named[1]) != step:
        raise InputError(f"{folder} holds a checkpoint of step {step}")
    if tree.get("lock_digest", lock_digest) != lock_digest:
        raise InputError(f"{folder} is of another run: of the lock digest {str(tree['lock_digest'])[:64]}")
    files = tree.get("files")
    if not isinstance(files, dict) or not files or not all(isinstance(entry, dict) for entry in files.values()):
        raise InputError(f"{folder / MANIFEST} names no files")
    found = set(tree_names(folder)) - {MANIFEST}
    for name in sorted(files.keys() ^ found):
        raise InputError(f"{folder}: {name} is {'missing' if name in files else 'not in the manifest'}")
    names, total = sorted(files), 0
    for name in names:
        path = folder / name
        with reading(path):
            size = path.stat().st_size
        if size != files[name].get("size_bytes"):
            raise InputError(f"{path} has {size} bytes, but {files[name].get('size_bytes')} by the manifest")
        total += size
    with closing(_hashes([folder / name for name in names], total)) as hashes:
        for name, digest in zip(names, hashes, strict=True):
            if digest != files[name].get("sha256"):
                raise InputError(f"{folder / name} does not have the SHA-256 of the manifest")
    return step


def _hashes(paths: list[Path], total: int) -> Generator[str]:
    """SHA-256 of each, in order; with several threads where that is worth it."""
    if total < _WORTH_BYTES:
        yield from map(file_sha256, paths)
        return
    pool = ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="hash")
    try:
        yield from pool.map(file_sha256, paths)
    finally:
        pool.shutdown(cancel_futures=True)


def newest_whole(
    run: RunDirectory, *, lock_digest: str, last_logged: int | None, warn: Callable[[str], None]
) -> int | None:
    """The step of the newest whole checkpoint of `run`, None where there is none.

    `last_logged`: the last step in the step log; what is said to be later is not of this run. Whatever is passed over
    gets one line through `warn`, and stays where it is.
    """
    if not run.checkpoints.is_dir():
        return None
    with reading(run.checkpoints):
        names = sorted(os.listdir(run.checkpoints), reverse=True)
    for name in names:
        try:
            if not _NAME.match(name):
                raise InputError(f"{run.checkpoints / name} is not a checkpoint")
            step = check_checkpoint(run.checkpoints / name, lock_digest=lock_digest)
            if last_logged is None or step > last_logged:
                at = "is empty" if last_logged is None else f"ends at step {last_logged}"
                raise InputError(f"{run.checkpoints / name} is of a step that was not logged: the log {at}")
        except InputError as error:
            warn(f"{error}; passed over")
            continue
        return step
    return None
