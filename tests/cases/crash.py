"""A run in forked ranks of which one is killed (SIGKILL) at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from tests.cases.training import run_steps


def killed(
    rank: int, world_size: int, *, moment: str, number: int, victim: int, delay_s: float, **arguments: Any
) -> dict[str, Any]:
    """`run_steps`, in which rank `victim` dies the `number`-th time, from 1, that the moment comes.

    moment: "step" (`delay_s` after a line was logged, or after a step on other ranks), "log" (half of a line
    is written), "state" (a file of states/ is opened), "checkpoint" (a file of a checkpoint is opened), "manifest"
    and "commit" (before that rename), "committed" (after the commit), "start" (a file of the run is opened).
    """
    if rank == victim:
        _arm(moment, _Fuse(number), delay_s, arguments["folder"])
    return run_steps(rank, world_size, **arguments)


class _Fuse:
    def __init__(self, number: int) -> None:
        self._left = number

    def reached(self) -> bool:
        self._left -= 1
        return self._left == 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(moment: str, fuse: _Fuse, delay_s: float, folder: str) -> None:
    from apertus_nemo.record import step_log
    from apertus_nemo.training import checkpoint, recorder

    if moment == "step":
        after = recorder.Recorder.on_train_batch_start

        def begin(*arguments: Any) -> None:
            if fuse.reached():
                threading.Timer(delay_s, _die).start()
            after(*arguments)

        recorder.Recorder.on_train_batch_start = begin  # type: ignore[method-assign]
    elif moment == "log":
        write = step_log.StepLogWriter._write

        def torn(log: Any, line: bytes) -> None:
            if fuse.reached():
                descriptor = os.open(log._path(len(log._offsets)), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(descriptor, line[: len(line) // 2])
                _die()
            write(log, line)

        step_log.StepLogWriter._write = torn  # type: ignore[method-assign]
    elif moment == "committed":
        clear = checkpoint._clear

        def cleared(*arguments: Any) -> None:
            if fuse.reached():
                _die()
            clear(*arguments)

        checkpoint._clear = cleared
    else:
        sys.addaudithook(
            lambda event, values: _die() if _is(moment, event, values, folder) and fuse.reached() else None
        )


def _is(moment: str, event: str, values: Any, folder: str) -> bool:
    """The audit event is the moment; it is told before it happens."""
    if event == "open":
        path = str(values[0])
        inside = path.startswith(folder)
        within = {"state": "/states/", "checkpoint": "/checkpoint-step-", "start": "/"}
        return inside and moment in within and within[moment] in path.removeprefix(folder)
    if event == "os.rename":
        target = str(values[1])
        if moment == "manifest":
            return target.endswith("manifest.json")
        return moment == "commit" and "/checkpoints/step-" in target
    return False
