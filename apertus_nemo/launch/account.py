"""Keeps an attempt's `progress.json` and `outcome.json` while its ranks run; see record/attempts.py.

account = Account(directory, attempt, secrets=(), warn=display.warning)
with account.kept():                  # whatever leaves the block is how the attempt ended
    account.event(event)              # of the first rank
    account.tick()                    # several times a second
    account.ending = Ending(KILLED, rank=1, signal=9)
    raise UnfitEnvironment("rank 1 was killed ...")
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from apertus_nemo.errors import ApertusError, UnfitEnvironment
from apertus_nemo.record.attempts import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    STOPPED,
    AttemptProgress,
    Outcome,
    write_outcome,
    write_progress,
)
from apertus_nemo.record.files import writing
from apertus_nemo.record.run_dir import RunDirectory

_EVERY_S = 1.0  # progress.json is written no more often


@dataclass(frozen=True)
class Ending:
    """What an error does not say of itself."""

    cause: str
    rank: int | None = None
    signal: int | None = None


class Account:
    """Of one attempt."""

    def __init__(
        self, directory: RunDirectory, attempt: int, *, secrets: Iterable[str], warn: Callable[[str], None]
    ) -> None:
        """`secrets`: values that the outcome must not hold."""
        self._directory, self._attempt, self._warn = directory, attempt, warn
        self._secrets = [text for text in secrets if text]
        self._progress = AttemptProgress("starting")
        self._written, self._due = 0.0, False
        self.ending: Ending | None = None  # of the error that is about to be raised
        self.stopped = False  # the ranks have ended as asked

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write the first progress, and the outcome however the block is left."""
        with writing(self._directory.attempt(self._attempt)):
            write_progress(self._directory.path, self._attempt, self._progress)
        try:
            yield
        except BaseException as error:
            self._end(self._of(error))
            raise
        step, steps = self._progress.step, self._progress.steps
        if self.stopped:
            self._end(Outcome(STOPPED, f"stopped as asked after step {step} of {steps}", 0, step))
        else:
            at = "" if step is None else f" at step {step}"
            self._end(Outcome(FINISHED, f"finished{at}", 0, step))

    def event(self, event: Mapping[str, Any]) -> None:
        """Take what the first rank reports."""
        if event["event"] == "phase":
            self._progress = replace(self._progress, phase=str(event["text"]))
        elif event["event"] == "step":
            first = self._progress.first_step
            self._progress = AttemptProgress(
                phase="training",
                first_step=event["step"] if first is None else first,
                step=event["step"],
                steps=event["steps"],
                loss=event["loss"],
                tokens=event["tokens"],
                elapsed_ms=int(event["seconds"] * 1000),
            )
        else:
            return
        self._due = True
        self.tick()

    def tick(self) -> None:
        """Write the progress where it is due. A disk that refuses does not end a run for it."""
        if self._due and time.monotonic() - self._written >= _EVERY_S:
            self._flush()

    def _flush(self) -> None:
        self._due, self._written = False, time.monotonic()
        with contextlib.suppress(OSError):
            write_progress(self._directory.path, self._attempt, self._progress)

    def _of(self, error: BaseException) -> Outcome:
        step = self._progress.step
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            number = int(signal.SIGINT)
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                number = error.code - 128
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            return Outcome(INTERRUPTED, f"the command was ended by {name}", 128 + number, step, signal=number)
        ending = self.ending or Ending(FAILED)
        code = error.exit_code if isinstance(error, ApertusError) else ApertusError.exit_code
        text = str(error) if isinstance(error, ApertusError) else f"{type(error).__name__}: {error}"
        return Outcome(ending.cause, self._clean(text), code, step, ending.rank, ending.signal)

    def _clean(self, text: str) -> str:
        """Without secrets, and without the place of the run, which is no property of it."""
        for secret in self._secrets:
            text = text.replace(secret, "(secret)")
        return text.replace(f"{self._directory.path}/", "") or "no reason was given"

    def _end(self, outcome: Outcome) -> None:
        with signals_held():
            if self._due:
                self._flush()
            try:
                write_outcome(self._directory.path, self._attempt, outcome)
            except UnfitEnvironment as error:
                self._warn(f"how this attempt ended could not be recorded: {error}")


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Put signals off until the block is left: one that came between the start of a rank and its entry in the list
    of what must be ended would leave that rank behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in came:
            signal.raise_signal(late)
