"""A run in forked ranks of which one, or all, are killed (SIGKILL) at a chosen moment.

Moments, by class:

start-up: "birth" (`delay_s` after the rank was forked, at the latest before its first step), "start" (a file of the run
    is opened)
steps: "step" (`delay_s` after a step began)
log writes: "log" (half of a line is written), "state" (a file of states/ is opened), "seal" (before a seal's rename)
checkpoint writes: "save" (`delay_s` after a rank began to save), "checkpoint" (a file of a checkpoint is opened),
    "manifest" (before its rename)
commits: "note" (before the rename of checkpoints.json), "commit" (before that of the checkpoint), "committed" (after
    it), "prune" (before what goes by policy is renamed away), "pruning" (among the removals of its files), "end"
    (before the rename of end.json)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apertus_nemo.errors import ApertusError
from tests.cases.training import run_steps

_OPENED = {"state": "/states/", "checkpoint": "/checkpoint-step-", "start": "/"}
_RENAMED = {
    "manifest": "/manifest.json",
    "note": "/checkpoints.json",
    "seal": "/seal.json",
    "end": "/end.json",
    "prune": ".pruned.partial",
}
MOMENTS = (
    "birth",
    "start",
    "step",
    "log",
    "state",
    "seal",
    "save",
    "checkpoint",
    "manifest",
    "note",
    "commit",
    "committed",
)
MOMENTS += ("prune", "pruning", "end")


def killed(
    rank: int,
    world_size: int,
    *,
    moment: str,
    number: int,
    victim: int,
    all_ranks: bool,
    delay_s: float,
    **arguments: Any,
) -> dict[str, Any]:
    """`run_steps`, in which rank `victim` dies the `number`-th time, from 1, that the moment comes to it.

    all_ranks: it takes all the others with it.
    """
    if rank == victim:
        die = _Death(all_ranks)
        left = [number]

        def come() -> None:
            left[0] -= 1
            if left[0] == 0:
                if moment in ("step", "save"):
                    threading.Timer(delay_s, die).start()
                else:
                    die()

        if moment == "birth":
            threading.Timer(delay_s, die).start()
        watch(moment, come, arguments["folder"])
    return run_steps(rank, world_size, **arguments)


def counted(rank: int, world_size: int, **arguments: Any) -> dict[str, int]:
    """`run_steps` undisturbed; how often each moment came to this rank."""
    counts = dict.fromkeys(MOMENTS, 0)

    def count(moment: str) -> Callable[[], None]:
        def come() -> None:
            counts[moment] += 1

        return come

    for moment in MOMENTS:
        watch(moment, count(moment), arguments["folder"])
    run_steps(rank, world_size, **arguments)
    return counts


def filled(rank: int, world_size: int, *, moment: str, number: int, disk: str, **arguments: Any) -> dict[str, Any]:
    """`run_steps` on a small disk, which is full from the `number`-th time on that the moment comes.

    The answer is {"error", "exit_code"} where the run ended with an error of ours.
    """
    from tests.crash.small_disk import fill

    left = [number]

    def come() -> None:
        left[0] -= 1
        if left[0] == 0:
            fill(disk)

    watch(moment, come, arguments["folder"])
    try:
        return run_steps(rank, world_size, **arguments)
    except ApertusError as error:
        return {"error": str(error), "exit_code": error.exit_code}


class _Death:
    """Kills this process, also from a process that it has forked; all ranks of the case where told to."""

    def __init__(self, all_ranks: bool) -> None:
        self._self, self._all = os.getpid(), all_ranks
        self._parent = os.getppid()

    def __call__(self) -> None:
        pids = [self._self]
        if self._all:
            pids = list(map(int, Path(f"/proc/{self._parent}/task/{self._parent}/children").read_text().split()))
            pids.sort(key=lambda pid: pid == self._self)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def watch(moment: str, come: Callable[[], None], folder: str) -> None:
    """Have `come` called at each moment of this kind, in this process."""
    from apertus_nemo.record import step_log
    from apertus_nemo.training import checkpoint, recorder

    if moment in ("step", "birth"):
        begin = recorder.Recorder.on_train_batch_start

        def begun(*arguments: Any) -> None:
            come()
            begin(*arguments)

        recorder.Recorder.on_train_batch_start = begun  # type: ignore[method-assign]
    elif moment == "save":
        save = recorder.save_checkpoint

        def saving(*arguments: Any, **more: Any) -> Any:
            come()
            return save(*arguments, **more)

        recorder.save_checkpoint = saving
    elif moment == "log":
        write = step_log.StepLogWriter._write

        def torn(log: Any, line: bytes) -> None:
            path, data = log._path(len(log._offsets)), line[: len(line) // 2]
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            before = os.fstat(descriptor).st_size
            os.write(descriptor, data)
            come()
            os.ftruncate(descriptor, before)
            os.close(descriptor)
            write(log, line)

        step_log.StepLogWriter._write = torn  # type: ignore[method-assign]
    elif moment == "committed":
        clear = checkpoint.prune

        def cleared(*arguments: Any, **more: Any) -> None:
            come()
            clear(*arguments, **more)

        checkpoint.prune = cleared
    else:
        removing = [False]

        def hook(event: str, values: Any) -> None:
            if event == "shutil.rmtree":
                removing[0] = str(values[0]).endswith(".pruned.partial")
            if _is(moment, event, values, folder, removing[0]):
                come()

        sys.addaudithook(hook)


def _is(moment: str, event: str, values: Any, folder: str, removing: bool) -> bool:
    """The audit event is the moment; it is told before it happens. "open TEXT": a path with that text is opened."""
    if event == "open":
        path = str(values[0])
        if moment.startswith("open "):
            return path.startswith(folder) and moment[5:] in path.removeprefix(folder)
        return moment in _OPENED and path.startswith(folder) and _OPENED[moment] in path.removeprefix(folder)
    if event == "os.remove":
        return moment == "pruning" and removing
    if event == "os.rename":
        target = str(values[1])
        if moment == "commit":
            return "/checkpoints/step-" in target
        return moment in _RENAMED and target.endswith(_RENAMED[moment])
    return False
