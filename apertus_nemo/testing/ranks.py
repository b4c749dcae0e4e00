"""Run a function on N ranks, forked from one parent that has imported NeMo once.

A cold start of NeMo costs tens of seconds; a fork costs milliseconds. `Parent` starts
`python -m apertus_nemo.testing.parent`, which imports NeMo and then waits: it has no process group,
no threads of OpenMP yet, and no device. Each case forks its ranks from it:

    with Parent() as parent:
        results = parent.run("tests.cases.norms:same_everywhere", world_size=2, arguments={"size": 8})

The function is called as `function(rank, world_size, **arguments)`; the environment holds RANK,
WORLD_SIZE, LOCAL_RANK and RENDEZVOUS_FILE (for a file:// store). What it returns must be JSON.
`results` is the list of the ranks' return values. A rank that raises, dies or is late ends the case:
every process of every rank's group is killed, and `RankFailed` carries the output of all ranks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class RankFailed(AssertionError):
    """A rank raised, was killed or did not end in time; the message holds every rank's output."""


class Parent:
    """The process that has imported NeMo; one for a whole test session."""

    def __init__(
        self,
        *,
        paths: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        """`modules` are imported as well, once, in place of in every rank."""
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        env = dict(os.environ if environment is None else environment)
        env["PYTHONPATH"] = os.pathsep.join([*paths, env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        env.setdefault("OMP_NUM_THREADS", "1")
        self._log = open(Path(self._scratch.name) / "parent.log", "w+b")  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "apertus_nemo.testing.parent", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            start_new_session=True,
        )
        self._count = 0
        self._ready = False

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RankFailed("the parent process died:\n" + self._log.read().decode(errors="replace"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(
        self,
        function: str,
        *,
        world_size: int = 1,
        arguments: Mapping[str, Any] | None = None,
        timeout_s: float = 120.0,
        environment: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Fork `world_size` ranks, call `module:function` on each, and return their results by rank."""
        if not self._ready:
            self._read()
            self._ready = True
        self._count += 1
        folder = Path(self._scratch.name) / f"case-{self._count:04d}"
        folder.mkdir()
        request = {
            "function": function,
            "world_size": world_size,
            "arguments": dict(arguments or {}),
            "timeout_s": timeout_s,
            "folder": str(folder),
            "environment": dict(environment or {}),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read()
        if answer["failure"] is None:
            return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world_size)]
        outputs = [
            f"--- rank {rank} ---\n" + (folder / f"output-{rank}.log").read_text(errors="replace")[-6000:]
            for rank in range(world_size)
        ]
        raise RankFailed("\n".join([f"{function}: {answer['failure']}", *outputs]))

    def close(self) -> None:
        """End the parent and whatever it left."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()
        self._scratch.cleanup()
