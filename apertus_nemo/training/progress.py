"""What a rank tells the process that launched it: one JSON line an event, through a pipe.

Events: {"event": "phase", "text"}, {"event": "step", "step", "steps", "loss", "learning_rate", "grad_norm", "tokens",
"seconds"}, {"event": "stopped", "step", "steps"}, {"event": "warning", "text"},
{"event": "error", "message", "exit_code", "rank"}, {"event": "done", ...}.
Nothing here enters the record: it is for people's eyes, and holds times.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Mapping
from typing import Any

FIRST_STEP = "first step"  # text of the phase from which on there is a step to save
_SHORT = 300  # characters of a text that is too long; each is at most twelve bytes of JSON


class Progress:
    """Writes events to a file descriptor; to nowhere without one. Each event is one `write`."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Progress:
        """The pipe named by APERTUS_PROGRESS_FD, or none."""
        value = environment.get("APERTUS_PROGRESS_FD")
        return cls(int(value) if value else None)

    def send(self, event: str, **values: Any) -> None:
        """Send one event; a launcher that is gone is no reason to stop training."""
        if self._descriptor is None:
            return
        line = json.dumps({"event": event, **values}).encode() + b"\n"
        if len(line) > select.PIPE_BUF:  # longer ones could mix with another rank's
            short = {name: v[:_SHORT] + " ..." if isinstance(v, str) else v for name, v in values.items()}
            line = json.dumps({"event": event, **short}).encode() + b"\n"
        try:
            os.write(self._descriptor, line)
        except OSError:
            self._descriptor = None
