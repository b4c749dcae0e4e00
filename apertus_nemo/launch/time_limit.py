"""The time that one start of a run has, and where it is noted: `attempts/NNN/start.json`.

    limit = TimeLimit("00:03:55:00", time.monotonic())
    limit.left_s(time.monotonic())          # seconds, for the ranks
    write_start(run, attempt=1, checkpoint_step=6, max_time=limit.text)
    last_time_limit(run)                    # what the newest attempt was started with

Why it is no part of the lock: `recipe/time_limit.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.overrides import parse
from apertus_nemo.recipe.time_limit import KEY, time_limit_s
from apertus_nemo.recipe.typed import show_value
from apertus_nemo.recipe.values import ALLOWED
from apertus_nemo.record.canonical import dumps, loads_canonical
from apertus_nemo.record.files import read_bytes, write_atomic
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.seal import START

FORMAT = 1
KIND = "apertus-nemo start"
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class TimeLimit:
    """`text` is "DD:HH:MM:SS" or None; it counts from `began`, in seconds of a monotonic clock."""

    text: str | None
    began: float

    def left_s(self, now: float) -> float | None:
        """What is left of it, below 0 where it is over; None without a limit."""
        limit = None if self.text is None else time_limit_s(self.text)
        return None if limit is None else self.began + limit - now


NO_LIMIT = TimeLimit(None, 0.0)


def time_limit_of(overrides: Sequence[str]) -> str | None:
    """The limit that overrides of `trainer.max_time` set, the last one; null or a removal: None. Raises InputError."""
    found: str | None = None
    for override in parse(overrides):
        value = None if override.is_delete() else override.value()
        if value is not None and not (isinstance(value, str) and time_limit_s(value)):
            raise InputError(f"{KEY} is {show_value(value)}; it must be text or null: {ALLOWED[KEY].reason}")
        found = value
    return found


def write_start(run: RunDirectory, *, attempt: int, checkpoint_step: int | None, max_time: str | None) -> None:
    """Note what an attempt is started with. Raises UnfitEnvironment where the disk does not allow it."""
    tree = {"checkpoint_step": checkpoint_step, "format": FORMAT, "kind": KIND, "max_time": max_time}
    write_atomic(run.attempt(attempt) / START, dumps(tree))


def last_time_limit(run: RunDirectory) -> str | None:
    """The limit of the newest attempt; None where it had none, or is of before limits were noted."""
    number = run.next_attempt() - 1
    path = run.attempt(max(number, 0)) / START
    if not path.exists():
        return None
    tree = loads_canonical(read_bytes(path, max_bytes=_MAX_BYTES), what=str(path))
    text = tree.get("max_time") if isinstance(tree, dict) and tree.get("kind") == KIND else None
    return text if isinstance(text, str) and time_limit_s(text) else None
