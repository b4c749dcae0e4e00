"""The attempts of a run: which steps each did, how it ended, and what its ranks said last.

A record seals how far an attempt came; why it ended is read from what is left: the seal, the output of the ranks, and
the curves in `logs/`. What cannot be told is said to be unknown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import loads_canonical
from apertus_nemo.record.places import AnyPath, names, open_binary, printable, read
from apertus_nemo.record.seal import SEAL, Seal
from apertus_nemo.report.throughput import Spell

_NUMBER = re.compile(r"[0-9]{3,6}\Z")
_OUTPUT = re.compile(r"rank-([0-9]{1,6})\.log\Z")
_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(r"(?:[A-Za-z_][\w.]*\.)?([A-Za-z_]\w*): (.+)")
_TAIL_BYTES = 16 * 2**10
_MAX_BYTES = 16 * 2**20
_MAX_RANKS = 256  # whose output is looked at
MAX_ATTEMPTS = 200  # shown: the first and the last


@dataclass
class Attempt:
    """What is known of one start."""

    number: int
    first_step: int | None = None
    last_step: int | None = None
    sealed_step: int | None = None  # of its last checkpoint
    ended: str = "unknown"  # finished, stopped, failed, killed, running, unknown
    cause: str = ""  # in one line
    began_s: float | None = None  # of training, by the curves; seconds since 1970
    ended_s: float | None = None
    other_machine: list[str] = field(default_factory=list)  # fields of the observation that were not as at first

    def tree(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))


def read_attempts(
    root: AnyPath, spells: dict[int, Spell], *, checkpoint_every_steps: int | None, planned_steps: int | None
) -> tuple[list[Attempt], int]:
    """(attempts, how many were left out). Whatever cannot be read is passed over: `verify` has named it."""
    try:
        numbers = sorted({int(name) for name in names(root / "attempts") if _NUMBER.match(name)})
    except OSError:
        numbers = []
    shown = numbers if len(numbers) <= MAX_ATTEMPTS else numbers[: MAX_ATTEMPTS // 2] + numbers[-MAX_ATTEMPTS // 2 :]
    running = isinstance(root, Path) and is_held(root)
    attempts = []
    for number in shown:
        folder = root / f"attempts/{number:03d}"
        attempt = Attempt(number)
        seal = _seal(folder, attempt)
        spell = spells.get(number)
        if spell is not None:
            attempt.began_s, attempt.ended_s = spell.began_s, spell.ended_s
            attempt.first_step, attempt.last_step = spell.first_step, spell.last_step
        attempt.last_step = max((s for s in (attempt.last_step, attempt.sealed_step) if s is not None), default=None)
        attempt.other_machine = _other_machine(root, folder)
        newest = number == numbers[-1]
        _judge(attempt, seal, folder, running and newest, newest, checkpoint_every_steps, planned_steps)
        attempts.append(attempt)
    return attempts, len(numbers) - len(shown)


def is_held(root: Path) -> bool:
    """A process on this machine trains in the run directory: it holds the kernel's lock on it."""
    import fcntl

    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _seal(folder: AnyPath, attempt: Attempt) -> Seal | None:
    try:
        seal = Seal.from_bytes(read(folder / SEAL, max_bytes=_MAX_BYTES), what=SEAL)
    except InputError:
        return None
    attempt.sealed_step = seal.mark.last_step
    return seal


def _other_machine(root: AnyPath, folder: AnyPath) -> list[str]:
    """Fields in which an attempt's own observation is not that of the first."""
    found = []
    for path in (root / "observed.json", folder / "observed.json"):
        if not path.is_file():
            return []
        try:
            tree = loads_canonical(read(path, max_bytes=_MAX_BYTES), what=path.name)
        except InputError:
            return []
        found.append(tree if isinstance(tree, dict) else {})
    first, now = found
    return sorted(printable(name) for name in first.keys() | now.keys() if first.get(name) != now.get(name))


def _judge(
    attempt: Attempt,
    seal: Seal | None,
    folder: AnyPath,
    running: bool,
    newest: bool,
    every: int | None,
    planned: int | None,
) -> None:
    """How it ended, by what it left."""
    sealed, error = attempt.sealed_step, _error(folder)
    if seal is not None and seal.end is not None:
        attempt.ended, attempt.cause = "finished", f"did the last step, {sealed}"
    elif error is not None:
        attempt.ended, attempt.cause = "failed", error
    elif running:
        attempt.ended, attempt.cause = "running", "a process of this machine holds the run"
    elif sealed is not None and attempt.last_step == sealed and _unplanned(sealed, every, planned):
        attempt.ended = "stopped"
        attempt.cause = f"as asked, with a checkpoint after step {sealed}"
    elif attempt.last_step is not None and attempt.last_step > (sealed or 0):
        attempt.ended = "killed"
        after = "without a checkpoint" if not sealed else f"its last checkpoint is of step {sealed}"
        attempt.cause = f"no rank left an error; {after}"
    elif newest:
        attempt.cause = "it left no end: killed, stopped, or at work on another machine"
    else:
        attempt.cause = "it left no end: stopped or killed"


def _unplanned(step: int, every: int | None, planned: int | None) -> bool:
    """No checkpoint was due after this step: somebody asked for it."""
    return every is not None and not (every > 0 and step % every == 0) and step != planned


def _error(folder: AnyPath) -> str | None:
    """The last line of the traceback that a rank ended with: of the lowest rank that has one."""
    for rank, name in sorted(_outputs(folder))[:_MAX_RANKS]:
        try:
            with open_binary(folder / name) as stream:
                if stream.seekable():
                    size = stream.seek(0, os.SEEK_END)
                    stream.seek(max(0, size - _TAIL_BYTES))
                tail = stream.read(_TAIL_BYTES).decode(errors="replace")
        except (OSError, InputError):
            continue
        message = last_error(tail)
        if message is not None:
            return printable(f"rank {rank}: {message}")
    return None


def _outputs(folder: AnyPath) -> Iterator[tuple[int, str]]:
    try:
        found = names(folder)
    except OSError:
        return
    for name in found:
        match = _OUTPUT.match(name)
        if match is not None:
            yield int(match[1]), name


def last_error(text: str) -> str | None:
    """ "Kind: message" of the last traceback in a text; None where there is none."""
    _, found, after = text.rpartition(_TRACEBACK)
    if not found:
        return None
    for line in after.splitlines()[1:]:
        if line[:1].isspace() or not line:
            continue
        match = _ERROR.match(line)
        return f"{match[1]}: {match[2]}" if match is not None else line
    return None
