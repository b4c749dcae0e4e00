"""A request to stop: SIGTERM or SIGUSR2. The step that goes on is ended and saved; then the run ends cleanly.

A second SIGTERM ends the process at once. The launcher passes a request on as SIGUSR2, so that a scheduler
which signals launcher and ranks alike counts once.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch


class Stop:
    """What this rank was asked for, and what all ranks agree on."""

    def __init__(self) -> None:
        self.requested = False
        self._terms = 0

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

    def agreed(self, device: str) -> bool:
        """Some rank was asked; collective, the same answer on every rank. `device`: "cpu" or "gpu"."""
        if torch.distributed.get_world_size() == 1:
            return self.requested
        flag = torch.tensor([int(self.requested)], dtype=torch.int32, device="cuda" if device == "gpu" else "cpu")
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
