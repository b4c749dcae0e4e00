"""Takes hold of a run directory, and says where the run in it goes on.

    with claimed(folder) as claim:                    # raises where another process has it
        state = look_at(folder, lock, warn=print)     # raises InputError where it holds another run
        state.finished, state.step

The claim is a lock of the kernel's on the folder itself. The ranks inherit it: it lasts until launcher and ranks
are gone, however they end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.record.canonical import dumps, is_unknown
from apertus_nemo.record.checkpoint_list import read_list
from apertus_nemo.record.checkpoints import newest_whole
from apertus_nemo.record.files import read_bytes, reading, writing
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.places import open_ordinary
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.seal import END, MAX_BYTES, Seal
from apertus_nemo.record.step_line import MAX_LINE_BYTES, StepLogHeader

_WAIT_S = 3.0  # for the ranks of a launcher that was killed just now
_MAX_LOCK_BYTES = 16 * 2**20
_SHOWN = 120  # characters of a value


@contextmanager
def claimed(folder: Path) -> Iterator[int]:
    """Hold the run directory, which is made where it is not there; the descriptor of the claim.

    Raises UnfitEnvironment where another process trains in it, or where the disk refuses.
    """
    while True:
        with writing(folder):
            made = _open(folder)
        if made is None:
            continue
        claim = made
        try:
            _lock(claim, folder)
            if not _is_at(claim, folder):  # another start has made it and given it up meanwhile
                continue
            yield claim
            return
        finally:
            os.close(claim)


def _open(folder: Path) -> int | None:
    """The folder, made where it is not there; None where another start gives it up this moment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # also of a folder that was there, and is gone when mkdir looks what it was
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise
        return None
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _is_at(claim: int, folder: Path) -> bool:
    """The folder that is held is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(claim), os.stat(folder))
    except FileNotFoundError:
        return False


def give_up(folder: Path) -> None:
    """Remove a folder in which nothing was written yet, unless another start has it."""
    with contextlib.suppress(OSError):
        claim = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(claim, folder):  # and not a new one of another start
                folder.rmdir()
        finally:
            os.close(claim)


def _lock(claim: int, folder: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UnfitEnvironment(
                    f"{folder}: another process is training in this run directory; wait for it, or end it"
                ) from None
        except OSError:  # a file system without locks; the step log refuses a second writer of this machine
            return
        time.sleep(0.05)


@dataclass(frozen=True)
class State:
    """Of a run that was begun."""

    finished: bool
    step: int | None  # of the checkpoint to go on from; None: from the start
    logged: int | None  # last step in the log
    steps: int  # planned


def planned_steps(run: RunConfig) -> int:
    """Steps of the whole run."""
    plan = BatchPlan.from_config(run)
    return plan.num_steps if run.trainer.max_steps is None else min(run.trainer.max_steps, plan.num_steps)


def read_lock(directory: RunDirectory) -> RunLock:
    """The lock of a run directory; raises InputError where it is none, or not the one that the step log names."""
    data = read_bytes(directory.lock, max_bytes=_MAX_LOCK_BYTES)
    lock = RunLock.from_bytes(data, what=str(directory.lock))
    header = _header(directory.steps)
    if header is not None and header.lock_digest != lock.digest:
        raise InputError(
            f"{directory.lock} is not the lock of the step log, whose digest is {header.lock_digest}: it was changed "
            "or exchanged; put the first one back, or choose another folder"
        )
    return lock


def _header(folder: Path) -> StepLogHeader | None:
    """The first line of a log; None where there is no complete one."""
    path = folder / "000000.jsonl"
    if not path.exists():
        return None
    with reading(path), open(open_ordinary(path), "rb") as stream:
        line = stream.readline(MAX_LINE_BYTES)
    return StepLogHeader.from_line(line[:-1], what=f"{path} line 1") if line.endswith(b"\n") else None


def refuse_other_run(directory: RunDirectory, lock: RunLock) -> None:
    """Raise InputError, naming the first field that differs, where the directory is not that of `lock`."""
    held = read_lock(directory)
    if held.digest == lock.digest:
        return
    found = RunLock.from_bytes(lock.to_bytes(), what="the lock of this start")  # numbers as JSON holds them
    field, one, other = _first_difference(dict(held.tree), dict(found.tree), "")
    raise InputError(
        f"{directory.path} holds a run that cannot go on like this: {field} is {_text(one)} in its lock and "
        f"{_text(other)} here; restore that, or choose another folder"
    )


def _first_difference(a: Any, b: Any, path: str) -> tuple[str, Any, Any]:
    """Dotted path and both values of the first field that is not the same; None stands for an absent one."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(a, dict) and isinstance(b, dict) and not is_unknown(a) and not is_unknown(b):
        keys = sorted(a.keys() | b.keys())
        pairs = [(f"{path}.{key}" if path else key, a.get(key), b.get(key)) for key in keys]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(a, b, strict=True))]
    for name, one, other in pairs:
        if dumps(one) != dumps(other):
            return _first_difference(one, other, name)
    return path, a, b


def _text(value: Any) -> str:
    text = "absent" if value is None else dumps(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def look_at(directory: RunDirectory, lock: RunLock, run: RunConfig, *, warn: Callable[[str], None]) -> State:
    """Where the run with this lock goes on. Every byte of the checkpoint that it goes on from has been checked."""
    steps, last = planned_steps(run), last_line(directory.steps)
    logged = None if last is None else int(last["step"])
    end = directory.path / END
    if end.is_file():
        done = Seal.from_bytes(read_bytes(end, max_bytes=MAX_BYTES), what=str(end)).mark.last_step
        if done is not None and done >= steps:
            return State(True, None, logged, steps)
    step = newest_whole(directory, lock_digest=lock.digest, last_logged=logged, warn=warn)
    for made in read_list(directory.path).made.values():
        if made.step > (step or 0) and not made.pruned and not directory.checkpoint(made.step).exists():
            warn(f"{directory.checkpoint(made.step)} was removed, and not by the run; passed over")
    return State(False, step, logged, steps)


def last_line(folder: Path) -> Mapping[str, Any] | None:
    """The last complete step of a log, unverified (the first rank verifies all of it); None where there is none."""
    if not folder.is_dir():
        return None
    with reading(folder):
        names = sorted(name for name in os.listdir(folder) if name.endswith(".jsonl"))
    for name in reversed(names):
        with reading(folder / name), open(folder / name, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 3 * MAX_LINE_BYTES))
            lines = stream.read().split(b"\n")[:-1]
        for line in reversed(lines):
            try:
                tree = json.loads(line)
            except ValueError:
                continue
            if isinstance(tree, dict) and type(tree.get("step")) is int:
                return tree
    return None
