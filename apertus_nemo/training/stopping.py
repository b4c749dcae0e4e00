"""A request to stop: SIGTERM, SIGUSR2, or the end of the time that the start has (`trainer.max_time`).

The step that goes on is ended and saved; then the run ends cleanly. A second SIGTERM ends the process at once. The
launcher passes a request on as SIGUSR2, so that a scheduler which signals launcher and ranks alike counts once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch


class Stop:
    """What this rank was asked for, and what all ranks agree on."""

    def __init__(self, *, time_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`time_s`: seconds from now in which the run should be saved and over; None: as many as it takes."""
        self.requested = False
        self._terms = 0
        self._clock = clock
        self._deadline = None if time_s is None else clock() + time_s
        self._step_began: float | None = None
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0

    def listen(self) -> None:
        """Handle the two signals from now on; nothing where this is not the main thread."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGUSR2, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        self.requested = True
        if number == signal.SIGTERM:
            self._terms += 1
        if self._terms > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def begun(self) -> None:
        """Training begins, or a step after a checkpoint: the time of the next step counts from here."""
        self._step_began = self._clock()

    def saved(self) -> None:
        """A checkpoint was saved since the last step ended."""
        assert self._step_began is not None
        now = self._clock()
        self._longest_save_s = max(self._longest_save_s, now - self._step_began)
        self._step_began = now

    def late(self) -> bool:
        """Another step and a checkpoint, as long as the longest so far, would not be over in time.

        Call it once at the end of each step.
        """
        now = self._clock()
        if self._step_began is not None:
            self._longest_step_s = max(self._longest_step_s, now - self._step_began)
        self._step_began = now
        return self._deadline is not None and now + self._longest_step_s + self._longest_save_s >= self._deadline

    def agreed(self, device: str) -> bool:
        """Some rank was asked, or is late; collective at the end of each step, the same answer on every rank.

        `device`: "cpu" or "gpu".
        """
        wanted = self.late() or self.requested
        if torch.distributed.get_world_size() == 1:
            return wanted
        flag = torch.tensor([int(wanted)], dtype=torch.int32, device="cuda" if device == "gpu" else "cpu")
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
