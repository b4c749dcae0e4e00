"""One rank of a run: `python -m apertus_nemo.training.worker RUN_DIRECTORY ATTEMPT STEP LAUNCHER SECONDS`.

STEP is that of the checkpoint to go on from ("-": none), LAUNCHER the process id of the launcher, SECONDS what is
left of `trainer.max_time` ("-": as long as it takes).

Reads `lock.json` and nothing else of the launching side; RANK, LOCAL_RANK and WORLD_SIZE say which rank it is.
An error of the user's is one line in the pipe to the launcher and the exit code of its kind; anything else is
a traceback in the rank's log and exit code 4.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from apertus_nemo.data.manifest import verify
from apertus_nemo.data.mixture import corpora
from apertus_nemo.errors import ApertusError
from apertus_nemo.recipe.typed import from_tree
from apertus_nemo.record.files import writing_for_others
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.training import imports
from apertus_nemo.training.heartbeat import STARTING, Heart
from apertus_nemo.training.progress import Progress


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Train as this rank until the run ends; the exit code."""
    began = time.monotonic()
    Heart.listen()
    die_with_launcher(int(arguments[3]))
    heart = Heart.from_environment(environment)
    heart.beat(STARTING)
    progress = Progress.from_environment(environment)
    rank = int(environment["RANK"])
    folder, attempt = Path(arguments[0]), int(arguments[1])
    try:
        if rank == 0:
            _verify_data(folder, Path(environment["APERTUS_CORPUS"]), heart)
        imports.install()
        heart.beat()
        with writing_for_others(RunDirectory(folder).attempt(attempt)):
            from apertus_nemo.training.run import train_rank
            from apertus_nemo.training.stopping import Stop

            left = None if arguments[4] == "-" else float(arguments[4]) - (time.monotonic() - began)
            stop = Stop(time_s=left)
            stop.listen()
            train_rank(
                folder,
                attempt=attempt,
                checkpoint_step=None if arguments[2] == "-" else int(arguments[2]),
                environment=environment,
                progress=progress,
                heart=heart,
                stop=stop,
            )
    except Exception as error:
        ours = isinstance(error, ApertusError)
        code = error.exit_code if isinstance(error, ApertusError) else 4
        message = str(error) if ours else f"{type(error).__name__}: {error}"
        progress.send("error", message=message, exit_code=code, rank=rank)
        with contextlib.suppress(OSError):  # a full disk has no room for the rank's log
            traceback.print_exc()
        return code
    return 0


def _verify_data(run_directory: Path, folder: Path, heart: Heart) -> None:
    """Every byte of the corpora in `folder` that the run reads, before anything heavy is imported."""
    path = RunDirectory.open(run_directory).lock
    run = from_tree(RunLock.from_bytes(path.read_bytes(), what=str(path)).tree["config"])
    for corpus in corpora(run, folder).values():
        verify(corpus, read=heart.beat)


def die_with_launcher(launcher: int) -> None:
    """Have the kernel kill this rank when the launcher is gone, however that ends (Linux: PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != launcher:  # it was gone before the kernel was asked
        os._exit(0)


if __name__ == "__main__":
    code = main(sys.argv[1:], os.environ)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # no interpreter shutdown: process groups and torch's threads have nothing left to do
