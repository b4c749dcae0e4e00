"""The attempts of a run: how far each came, and how it ended.

    for attempt in read_attempts(folder):            # a run directory, or a copy of one
        attempt.number, attempt.cause, attempt.message, attempt.tokens_per_second

The launcher writes two files into `attempts/NNN/`: `progress.json`, over and over while the attempt goes on, and
`outcome.json` once, when it has ended. An attempt that has the first and not the second has a launcher that was
killed, or goes on still: which of the two, the kernel's lock on the run directory says (record/claim.py). The first
records of version 1 have neither file. One attempt that is broken does not hide the others: see `Attempt.broken`.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps, from_hex_float, hex_float, loads_canonical
from apertus_nemo.record.files import write_atomic
from apertus_nemo.record.places import AnyPath, names, read
from apertus_nemo.record.seal import SEAL, Seal

FORMAT = 1
OUTCOME = "outcome.json"
PROGRESS = "progress.json"
OUTCOME_KIND = "apertus-nemo outcome"
PROGRESS_KIND = "apertus-nemo progress"
MAX_BYTES = 2**16  # of either file
MAX_MESSAGE = 2000  # characters

# Causes that a launcher writes.
FINISHED = "finished"  # the last step of the run is done
STOPPED = "stopped"  # as asked, with a checkpoint
KILLED = "killed"  # a rank was ended by a signal
FAILED = "failed"  # a rank, or the launcher itself, ended with an error
HUNG = "hung"  # a rank made no progress for too long
INTERRUPTED = "interrupted"  # the launcher was told to end at once (Ctrl-C, SIGTERM, SIGHUP)
CAUSES = (FINISHED, STOPPED, KILLED, FAILED, HUNG, INTERRUPTED)
# Causes that follow from what is not there.
RUNNING = "running"
LAUNCHER_GONE = "launcher gone"  # killed, or its machine went down: it wrote no outcome
UNKNOWN = "unknown"  # a record from before outcomes were written, or a file that cannot be read

_ATTEMPT = re.compile(r"[0-9]{3,6}\Z")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, as its launcher saw it."""

    cause: str  # one of CAUSES
    message: str  # one line; what the command said
    exit_code: int  # of the command
    step: int | None = None  # last step that was done; None: none in this attempt
    rank: int | None = None  # that ended the others
    signal: int | None = None  # that killed the rank, or interrupted the launcher


@dataclass(frozen=True)
class AttemptProgress:
    """How far an attempt has come. Times of the training steps alone, in milliseconds, by the first rank's clock."""

    phase: str  # what goes on, for people
    first_step: int | None = None  # first step of this attempt; None: none is done
    step: int | None = None  # last step that is done
    steps: int | None = None  # of the whole run
    loss: float | None = None  # of that step
    tokens: int = 0  # of this attempt's steps
    elapsed_ms: int = 0


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int
    cause: str  # one of CAUSES, RUNNING, LAUNCHER_GONE, UNKNOWN
    message: str  # one line, and never empty
    outcome: Outcome | None = None
    progress: AttemptProgress | None = None
    broken: str | None = None  # why a file of the attempt cannot be read

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the attempt's steps; None where there is none."""
        progress = self.progress
        if progress is None or progress.elapsed_ms <= 0 or progress.tokens <= 0:
            return None
        return progress.tokens * 1000.0 / progress.elapsed_ms


def read_attempts(run: AnyPath, *, running: bool | None = False) -> list[Attempt]:
    """Every attempt of a run, in order; never raises for one that is broken.

    `running`: whether a process holds the run directory (`claim.is_claimed`; None: it cannot be known). Copies of runs
    that go on do not exist.
    """
    numbers = attempt_numbers(run)
    return [read_attempt(run, number, last=number == numbers[-1], running=running) for number in numbers]


def attempt_numbers(run: AnyPath) -> list[int]:
    """The numbers of a run's attempts, ascending; raises InputError where the folder cannot be read."""
    try:
        return sorted(int(name) for name in names(run / "attempts") if _ATTEMPT.match(name))
    except OSError as error:
        raise InputError(f"could not read {run / 'attempts'}: {error.strerror or error}") from error


def read_attempt(run: AnyPath, number: int, *, last: bool, running: bool | None) -> Attempt:
    """One attempt; `last`: it is the newest. Never raises for one that is broken."""
    folder = run / "attempts" / f"{number:03d}"
    broken: str | None = None
    progress: AttemptProgress | None = None
    try:
        if (folder / PROGRESS).is_file():
            progress = progress_from_bytes(read(folder / PROGRESS, max_bytes=MAX_BYTES), what=str(folder / PROGRESS))
    except InputError as error:
        broken = str(error)
    try:
        if (folder / OUTCOME).is_file():
            data = read(folder / OUTCOME, max_bytes=MAX_BYTES)
            outcome = outcome_from_bytes(data, what=str(folder / OUTCOME), attempt=number)
            return Attempt(number, outcome.cause, outcome.message, outcome, progress, broken)
    except InputError as error:
        return Attempt(number, UNKNOWN, "its outcome cannot be read", None, progress, str(error))
    if last and running:
        phase = "starting" if progress is None else progress.phase
        return Attempt(number, RUNNING, phase, None, progress, broken)
    if progress is not None:
        if last and running is None:
            return Attempt(
                number, UNKNOWN, "no outcome: it goes on, or its launcher was killed", None, progress, broken
            )
        seen = progress.phase if progress.step is None else f"step {progress.step}"
        text = f"the launcher was killed, or lost its machine; last seen at: {seen}"
        return Attempt(number, LAUNCHER_GONE, text, None, progress)
    if broken is not None:
        return Attempt(number, UNKNOWN, "its files cannot be read", None, None, broken)
    return _without_files(folder, number)


def _without_files(folder: AnyPath, number: int) -> Attempt:
    """Of an early record, which says no more than that a run has finished."""
    try:
        if (folder / SEAL).is_file():
            seal = Seal.from_bytes(read(folder / SEAL, max_bytes=MAX_BYTES), what=str(folder / SEAL))
            if seal.end is not None:
                return Attempt(number, FINISHED, f"finished at step {seal.mark.last_step or 0}")
    except InputError as error:
        return Attempt(number, UNKNOWN, "its seal cannot be read", broken=str(error))
    return Attempt(number, UNKNOWN, "no outcome was recorded")


def write_outcome(folder: Path, attempt: int, outcome: Outcome) -> None:
    """Write `attempts/<attempt>/outcome.json` of the run directory `folder`; raises UnfitEnvironment."""
    tree = {**asdict(outcome), "message": _one_line(outcome.message)}
    data = dumps({**tree, "attempt": attempt, "format": FORMAT, "kind": OUTCOME_KIND})
    write_atomic(Path(folder) / "attempts" / f"{attempt:03d}" / OUTCOME, data)


def write_progress(folder: Path, attempt: int, progress: AttemptProgress) -> None:
    """Write `attempts/<attempt>/progress.json`, over the one before, whole or not at all; raises OSError.

    Not flushed to the disk: it is for eyes, and what is lost with a machine is told by the step log.
    """
    tree = {**asdict(progress), "phase": _one_line(progress.phase)}
    tree["loss"] = None if progress.loss is None else hex_float(progress.loss)
    data = dumps({**tree, "attempt": attempt, "format": FORMAT, "kind": PROGRESS_KIND})
    path = Path(folder) / "attempts" / f"{attempt:03d}" / PROGRESS
    partial = path.with_name(f".{PROGRESS}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _one_line(text: str) -> str:
    """A text for one line, without what UTF-8 cannot hold."""
    text = "; ".join(line for line in text.splitlines() if line.strip())
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 4] + " ..."


def outcome_from_bytes(data: bytes, *, what: str, attempt: int) -> Outcome:
    """Read an `outcome.json`; raises InputError, beginning with `what`."""
    tree = _tree(data, what, OUTCOME_KIND, "outcome of an attempt", set(Outcome.__dataclass_fields__))
    if tree["attempt"] != attempt:
        raise InputError(f"{what}: is of attempt {str(tree['attempt'])[:20]}, not of attempt {attempt}")
    found = {name: tree[name] for name in Outcome.__dataclass_fields__}
    if (
        found["cause"] not in CAUSES
        or not isinstance(found["message"], str)
        or not 0 < len(found["message"]) <= MAX_MESSAGE
        or not _count(found["exit_code"], 255)
        or not all(found[name] is None or _count(found[name]) for name in ("step", "rank", "signal"))
    ):
        raise InputError(f"{what}: is not the outcome of an attempt")
    return Outcome(**found)


def progress_from_bytes(data: bytes, *, what: str) -> AttemptProgress:
    """Read a `progress.json`; raises InputError, beginning with `what`."""
    tree = _tree(data, what, PROGRESS_KIND, "progress of an attempt", set(AttemptProgress.__dataclass_fields__))
    found = {name: tree[name] for name in AttemptProgress.__dataclass_fields__}
    if (
        not isinstance(found["phase"], str)
        or not all(found[name] is None or _count(found[name]) for name in ("first_step", "step", "steps"))
        or not all(_count(found[name]) for name in ("tokens", "elapsed_ms"))
        or not (found["loss"] is None or isinstance(found["loss"], str))
    ):
        raise InputError(f"{what}: is not the progress of an attempt")
    if found["loss"] is not None:
        found["loss"] = from_hex_float(found["loss"], what=what)
    return AttemptProgress(**found)


def _tree(data: bytes, what: str, kind: str, noun: str, fields: set[str]) -> dict[str, Any]:
    tree = loads_canonical(data, what=what, max_bytes=MAX_BYTES)
    if not isinstance(tree, dict) or tree.get("kind") != kind:
        raise InputError(f"{what}: is not the {noun}")
    if tree.get("format") != FORMAT:
        raise InputError(f"{what}: has format {str(tree.get('format'))[:40]}; this version reads {FORMAT}")
    if set(tree) != fields | {"attempt", "format", "kind"}:
        raise InputError(f"{what}: is not the {noun}")
    return tree


def _count(value: object, most: int = 2**53 - 1) -> bool:
    return type(value) is int and 0 <= value <= most
