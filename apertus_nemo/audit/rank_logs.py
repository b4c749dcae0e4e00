"""What the ranks of a run wrote, line by line, in bounded memory; and on, while the run goes on.

    for line in read_logs(run, attempt=None, rank=None, last_lines=10): line.rank, line.text
    for item in follow(run, rank=None, last_lines=10): ...       # Line, or Ended once the run has ended

Lines are of logs that anything may have written to: `Line.text` holds no character that drives a terminal, and is cut
where it is long.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.errors import InputError
from apertus_nemo.record.attempts import FINISHED, RUNNING, STOPPED, attempt_numbers, read_attempt
from apertus_nemo.record.claim import is_claimed
from apertus_nemo.record.places import open_ordinary

MAX_LINE_CHARACTERS = 4000  # of one that is shown
WAIT_S = 10.0  # for another attempt after one that did not end well
_BLOCK_BYTES = 2**16
_POLL_S = 0.2
_LOG = re.compile(r"rank-(0|[1-9][0-9]{0,6})\.log\Z")


@dataclass(frozen=True)
class Line:
    """One line of one rank."""

    attempt: int
    rank: int
    text: str


@dataclass(frozen=True)
class Ended:
    """There is nothing more to come."""

    attempt: int
    cause: str  # see record/attempts.py
    message: str


def pick_attempt(run: Path, attempt: int | None) -> int:
    """The number of an attempt that is there; the last one for None. Raises InputError."""
    numbers = attempt_numbers(run)
    if not numbers:
        raise InputError(f"{run} has no attempt yet: nothing was printed")
    if attempt is None:
        return numbers[-1]
    if attempt not in numbers:
        raise InputError(f"{run} has no attempt {attempt}: its attempts are {_span(numbers)}")
    return attempt


def open_run(run: Path) -> Path:
    """The folder of a run; raises InputError for anything else."""
    if not run.is_dir():
        raise InputError(f"{run} is not a folder: give a run directory; apertus-nemo runs lists them")
    if not (run / "attempts").is_dir():
        raise InputError(f"{run} is not a run directory: it holds no attempts")
    return run


def ranks_of(run: Path, attempt: int, rank: int | None) -> list[int]:
    """Ranks that have a log in an attempt; `rank` alone where one is given. Raises InputError where it has none."""
    folder = run / "attempts" / f"{attempt:03d}"
    try:
        found = sorted(int(match[1]) for name in os.listdir(folder) if (match := _LOG.match(name)))
    except OSError as error:
        raise InputError(f"could not read {folder}: {error.strerror or error}") from error
    if rank is None:
        return found
    if rank not in found:
        have = f"there are {_span(found)}" if found else "there is none at all"
        raise InputError(f"attempt {attempt} of {run} has no log of rank {rank}: {have}")
    return [rank]


def _span(numbers: list[int]) -> str:
    """Numbers for people: "0 to 7", "0, 2"."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    shown = ", ".join(map(str, numbers[:10]))
    return shown if len(numbers) <= 10 else f"{shown} and {len(numbers) - 10} more"


def read_logs(run: Path, *, attempt: int | None, rank: int | None, last_lines: int | None) -> Iterator[Line]:
    """The lines of one attempt, rank after rank; of each, the last `last_lines` where that is given.

    Raises InputError where there is no such run, attempt or rank, or a log cannot be read.
    """
    number = pick_attempt(open_run(run), attempt)
    for each in ranks_of(run, number, rank):
        log = _Log(run, number, each, last_lines)
        try:
            yield from log.lines(final=True)
        finally:
            log.close()


def follow(
    run: Path,
    *,
    attempt: int | None = None,
    rank: int | None,
    last_lines: int | None,
    wait_s: float = WAIT_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Line | Ended]:
    """The lines of an attempt, the last one by default, as they come, then those of each later attempt; at last Ended.

    The run has ended when it is finished, or stopped as asked, or when an attempt has ended otherwise and for `wait_s`
    no process has taken up the run. Raises what `read_logs` does; only a run that is being started may lack an attempt.
    """
    open_run(run)
    while not attempt_numbers(run) and is_claimed(run):
        sleep(_POLL_S)
    number = pick_attempt(run, attempt)
    logs: dict[int, _Log] = {}
    silent_since: float | None = None
    try:
        while True:
            claimed = is_claimed(run)  # before the logs are read: what came before the end is read then
            newest = attempt_numbers(run)[-1]
            state = read_attempt(run, number, last=number == newest, running=claimed)
            over = state.cause != RUNNING and not (state.outcome is None and claimed is None)
            for each in ranks_of(run, number, None):
                if each not in logs and rank in (None, each):
                    logs[each] = _Log(run, number, each, last_lines)
            came = False
            for log in logs.values():
                for line in log.lines(final=over):
                    came = True
                    yield line
            if over and number < newest:
                number, logs, silent_since = number + 1, _closed(logs), None
                last_lines = None  # of a new attempt, all
                while number not in attempt_numbers(run):
                    number += 1
                continue
            if over:
                silent_since = clock() if silent_since is None else silent_since
                waited = not claimed and clock() - silent_since >= wait_s
                if state.cause in (FINISHED, STOPPED) or waited:
                    if rank is not None and rank not in logs:
                        ranks_of(run, number, rank)  # raises
                    yield Ended(number, state.cause, state.message)
                    return
            if not came:
                sleep(_POLL_S)
    finally:
        _closed(logs)


def _closed(logs: dict[int, _Log]) -> dict[int, _Log]:
    for log in logs.values():
        log.close()
    return {}


class _Log:
    """One rank's log; remembers how far it was read."""

    def __init__(self, run: Path, attempt: int, rank: int, last_lines: int | None) -> None:
        self._attempt, self._rank = attempt, rank
        self._path = run / "attempts" / f"{attempt:03d}" / f"rank-{rank}.log"
        self._rest = b""  # of a line that has not ended
        self._skipping = False  # in a line that was cut
        try:
            self._stream = io.FileIO(open_ordinary(self._path))
            if last_lines is not None:
                self._stream.seek(_start_of_last(self._stream, last_lines))
        except OSError as error:
            raise InputError(f"could not read {self._path}: {error.strerror or error}") from error

    def lines(self, *, final: bool) -> Iterator[Line]:
        """What came since the last call; with `final`, the last line too where it has no end."""
        while True:
            try:
                block = self._stream.read(_BLOCK_BYTES)
            except OSError as error:
                raise InputError(f"could not read {self._path}: {error.strerror or error}") from error
            if not block:
                break
            if self._skipping and b"\n" not in block:
                continue
            *whole, self._rest = (self._rest + block).split(b"\n")
            for text in whole:
                if not self._skipping:
                    yield self._line(text)
                self._skipping = False
            if len(self._rest) > _BLOCK_BYTES:
                if not self._skipping:
                    yield self._line(self._rest)
                self._rest, self._skipping = b"", True
        if final and self._rest:
            if not self._skipping:
                yield self._line(self._rest)
            self._rest = b""

    def _line(self, data: bytes) -> Line:
        return Line(self._attempt, self._rank, show(data))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _start_of_last(stream: io.FileIO, lines: int) -> int:
    """Where the last `lines` lines begin; a last one without an end counts."""
    size = position = stream.seek(0, os.SEEK_END)
    if lines == 0:
        return size
    left = lines
    while position > 0:
        start = max(0, position - _BLOCK_BYTES)
        stream.seek(start)
        block = stream.read(position - start)
        at = len(block)
        if position == size and block.endswith(b"\n"):
            at -= 1  # ends the last line
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            left -= 1
            if left == 0:
                return start + at + 1
        position = start
    return 0


def show(data: bytes) -> str:
    """A line for a terminal: what is not text, or would drive it, is escaped; tabs stay; cut where it is long."""
    text = data.removesuffix(b"\r").decode("utf-8", "backslashreplace")
    if len(text) > MAX_LINE_CHARACTERS:
        text = text[: MAX_LINE_CHARACTERS - 4] + " ..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)
