"""The process behind `ranks.Parent`: imports NeMo once, then forks the ranks of each case.

Protocol: one JSON line in (the request), one JSON line out (`{"failure": null | text}`); a first line
out says that the imports are done. Ranks write their output and result into the request's folder.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def _rank(request: dict[str, Any], rank: int) -> None:
    """The life of one forked rank; never returns."""
    os.setsid()
    folder = Path(request["folder"])
    output = os.open(folder / f"output-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        os.environ.update(request["environment"])
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request["world_size"]),
            RENDEZVOUS_FILE=str(folder / "rendezvous"),
        )
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        result = function(rank, request["world_size"], **request["arguments"])
        partial = folder / f"result-{rank}.json.partial"
        partial.write_text(json.dumps(result))
        partial.rename(folder / f"result-{rank}.json")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(request: dict[str, Any]) -> str | None:
    """Fork the ranks and wait for them; what went wrong, or None."""
    ranks: dict[int, int] = {}
    for rank in range(request["world_size"]):
        pid = os.fork()
        if pid == 0:
            _rank(request, rank)
        ranks[pid] = rank
    deadline = time.monotonic() + request["timeout_s"]
    waiting, failure = dict(ranks), None
    while waiting and failure is None:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in waiting:
            rank = waiting.pop(pid)
            if status != 0:
                failure = f"rank {rank} ended with status {os.waitstatus_to_exitcode(status)}"
        elif time.monotonic() > deadline:
            failure = f"not done after {request['timeout_s']} s; waiting for ranks {sorted(waiting.values())}"
        else:
            time.sleep(0.01)
    for pid in ranks:
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    for pid in waiting:
        os.waitpid(pid, 0)
    return failure


def main() -> None:
    """Import, announce, serve until standard input ends."""
    answers = os.dup(1)
    os.dup2(2, 1)
    from apertus_nemo.training import imports

    imports.install()
    from apertus_nemo.training import preload  # noqa: F401  (the import is the point)

    for module in sys.argv[1:]:
        importlib.import_module(module)

    os.write(answers, b'{"ready": true}\n')
    for line in sys.stdin:
        failure = _run(json.loads(line))
        os.write(answers, json.dumps({"failure": failure}).encode() + b"\n")


if __name__ == "__main__":
    main()
