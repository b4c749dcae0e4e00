"""How runs do, at a glance: from the ends of their logs and the last of their attempts.

    for status in look(find_runs([Path("runs")])): status.state, status.step, status.last_failure

Whether a run goes on is the kernel's to say (record/claim.py). Nothing is verified here, which takes reading all of a
record: see audit/verify.py. A record that cannot be read is a status too, with what could be read and the reason.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.audit.compare import planned_steps
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.record import attempts as ends
from apertus_nemo.record.attempts import Attempt, attempt_numbers, read_attempt
from apertus_nemo.record.canonical import loads, sha256_hex
from apertus_nemo.record.claim import is_claimed
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.places import open_ordinary, read
from apertus_nemo.record.seal import END, Seal
from apertus_nemo.record.seal import MAX_BYTES as MAX_SEAL_BYTES
from apertus_nemo.record.step_line import MAX_LINE_BYTES, StepLogHeader, StepRecord, parse_line

RUNNING, STOPPED, FINISHED, FAILED, INTERRUPTED = "running", "stopped", "finished", "failed", "interrupted"
UNKNOWN = "unknown"  # it was not finished, and the file system cannot say whether it goes on
BROKEN = "broken"  # a part of the record cannot be read

_STATES = {  # of a run that nothing holds: by how its last attempt ended
    ends.STOPPED: STOPPED,
    ends.KILLED: FAILED,
    ends.FAILED: FAILED,
    ends.HUNG: FAILED,
    ends.INTERRUPTED: INTERRUPTED,
    ends.LAUNCHER_GONE: INTERRUPTED,
    ends.UNKNOWN: INTERRUPTED,  # of a record from before outcomes were written
}
_FAILURES = (ends.KILLED, ends.FAILED, ends.HUNG, ends.INTERRUPTED, ends.LAUNCHER_GONE)
_DEPTH = 2  # runs/a-1, and sweep/000 below a folder of sweeps
_MAX_LOCK_BYTES = 16 * 2**20
_SEGMENT = re.compile(r"[0-9]{6}\.jsonl\Z")
_LOOKED_BACK = 20  # attempts, for the last one that failed


@dataclass(frozen=True)
class RunStatus:
    """One run; None: not known, or not yet."""

    run: str  # the folder
    state: str
    stage: int | None = None  # from 1: of the lock's stages, the one of the last step
    stages: int | None = None
    stage_name: str | None = None  # where the recipe names stages
    step: int | None = None  # last one that was logged
    steps: int | None = None  # planned
    tokens: int | None = None  # consumed, in the whole run
    loss: float | None = None  # of that step
    tokens_per_second: float | None = None  # mean over the steps of the last attempt that did any
    attempts: int = 0
    phase: str | None = None  # of a running one
    last_failure: str | None = None  # of the last attempt that did not end well: its number, cause and line
    broken: str | None = None  # what cannot be read, and why

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        loss = None if self.loss is None or not math.isfinite(self.loss) else self.loss
        return {**self.__dict__, "loss": loss}


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Run directories: the folders themselves, or those in them, sorted by name, numbers by value.

    Raises InputError for a folder that is not there, or cannot be read.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give a run directory, or a folder that holds some")
        found.update(dict.fromkeys(_below(folder, _DEPTH)))
    return list(found)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            inner = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        if depth == _DEPTH:
            raise InputError(f"could not read {folder}: {error.strerror or error}") from error
        yield folder  # a row that says so
        return
    names = {name for name, _ in inner}
    if "lock.json" in names or {"attempts", "steps"} <= names:
        yield folder
    elif depth:
        for name, is_folder in sorted(inner, key=lambda item: _natural(item[0])):
            if is_folder:
                yield from _below(folder / name, depth - 1)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in re.split("([0-9]+)", name)]


def look(runs: Iterable[Path]) -> Iterator[RunStatus]:
    """The status of each; never raises for one that is broken."""
    return map(status_of, runs)


class _Look:
    """One run; what cannot be read is noted, and the rest goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def attempt(self, action: Any, *arguments: Any) -> Any:
        """The action's result, or None and a problem."""
        try:
            return action(*arguments)
        except (ApertusError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            self.problems.append(text.replace(f"{self.folder}/", "") or type(error).__name__)
            return None

    def lock(self) -> tuple[int | None, list[tuple[int, str | None]]]:
        """Planned steps, and of each stage the sample at which it ends, and its name where it has one."""
        data = read(self.folder / "lock.json", max_bytes=_MAX_LOCK_BYTES)
        tree = loads(data, what="lock.json")
        if not isinstance(tree, dict) or not isinstance(tree.get("stages"), list):
            raise InputError("lock.json: is not a lock")
        try:
            ends_at = [(stage["to_sample"], stage.get("data", {}).get("stage")) for stage in tree["stages"]]
        except (KeyError, TypeError, AttributeError):
            ends_at = [("", "")]
        if not all(type(end) is int and isinstance(name, (str, type(None))) for end, name in ends_at):
            raise InputError("lock.json: its stages do not say where they end")
        first = self.folder / "steps" / "000000.jsonl"
        if first.is_file():
            with open(open_ordinary(first), "rb") as stream:
                line = stream.readline(MAX_LINE_BYTES)
            named = StepLogHeader.from_line(line[:-1], what="").lock_digest if line.endswith(b"\n") else None
            if named is not None and named != sha256_hex(data):
                raise InputError("lock.json is not the lock of the step log: it was changed or exchanged")
        return planned_steps(RunLock(tree)), ends_at

    def finished(self) -> int | None:
        """The last step, where the end was written."""
        path = self.folder / END
        if not path.exists() and not path.is_symlink():
            return None
        return Seal.from_bytes(read(path, max_bytes=MAX_SEAL_BYTES), what=END).mark.last_step or 0


def status_of(folder: Path) -> RunStatus:
    """How the run in `folder` does; never raises for what stands in it."""
    look = _Look(folder)
    running = look.attempt(is_claimed, folder)
    planned, stage_ends = look.attempt(look.lock) or (None, [])
    last: StepRecord | None = look.attempt(last_step, folder)
    end = look.attempt(look.finished)
    numbers: list[int] = look.attempt(attempt_numbers, folder) or []
    recent: list[Attempt] = []  # newest first
    for number in reversed(numbers[-_LOOKED_BACK:]):
        recent.append(read_attempt(folder, number, last=number == numbers[-1], running=running))
        if recent[-1].broken is not None:
            look.problems.append(recent[-1].broken.replace(f"{folder}/", ""))
        if recent[-1].cause in _FAILURES:
            break
    failed = next((attempt for attempt in recent if attempt.cause in _FAILURES), None)
    rate = next((a.tokens_per_second for a in recent if a.tokens_per_second is not None), None)
    state = _state(running, end, recent, look.problems)
    stage = _stage([sample for sample, _ in stage_ends], last)
    return RunStatus(
        run=str(folder),
        state=state,
        stage=stage,
        stages=len(stage_ends) or None,
        stage_name=None if stage is None else stage_ends[stage - 1][1],
        step=None if last is None else last.step,
        steps=planned,
        tokens=None if last is None else last.consumed_tokens,
        loss=None if last is None else last.loss,
        tokens_per_second=rate,
        attempts=len(numbers),
        phase=recent[0].message if recent and recent[0].cause == ends.RUNNING else None,
        last_failure=None if failed is None else f"attempt {failed.number}: {failed.cause}: {failed.message}",
        broken="; ".join(look.problems) or None,
    )


def _state(running: bool | None, end: int | None, recent: list[Attempt], problems: list[str]) -> str:
    if running:
        return RUNNING
    if problems:
        return BROKEN
    if end is not None:
        return FINISHED
    cause = recent[0].cause if recent else ends.UNKNOWN
    if cause == ends.FINISHED:
        problems.append(f"attempt {recent[0].number} says that the run finished, and there is no {END}")
        return BROKEN
    return UNKNOWN if running is None and cause == ends.UNKNOWN else _STATES[cause]


def _stage(stage_ends: list[int], last: StepRecord | None) -> int | None:
    if not stage_ends:
        return None
    consumed = 0 if last is None else last.consumed_samples or 0
    return next((number for number, end in enumerate(stage_ends, 1) if consumed <= end), len(stage_ends))


def last_step(folder: Path) -> StepRecord | None:
    """The last complete line of a run's step log, read from its end; None where there is none.

    Raises InputError where that line is none of a step log, OSError where it cannot be read. The chain is not verified.
    """
    steps = folder / "steps"
    try:
        names = sorted(name for name in os.listdir(steps) if _SEGMENT.match(name))
    except FileNotFoundError:
        return None
    for name in reversed(names):
        with open(open_ordinary(steps / name), "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 3 * MAX_LINE_BYTES))
            lines = stream.read(3 * MAX_LINE_BYTES).split(b"\n")[:-1]  # what stands after the last end is torn
        if not lines and size > MAX_LINE_BYTES:
            raise InputError(f"steps/{name}: its last line is longer than {MAX_LINE_BYTES} bytes")
        if lines:
            what = f"steps/{name}, last line"
            if name == names[0] and len(lines) == 1 and size <= 3 * MAX_LINE_BYTES:
                StepLogHeader.from_line(lines[0], what=what)
                return None
            return parse_line(lines[-1], what=what)[0]
    return None


def to_json(statuses: Iterable[RunStatus]) -> str:
    """All of them, as one JSON document."""
    return json.dumps({"format": 1, "runs": [status.tree() for status in statuses]}, indent=2, sort_keys=True)
