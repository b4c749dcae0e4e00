"""All-reduce on this machine, against sums that are known exactly; and which network plugin NCCL uses.

    all_reduce("gloo", ranks=2, messages=CPU_MESSAGES, ...)       # a Check
    network_plugin("Libfabric", log)                                # a Check, from NCCL's own log

The ranks are processes of their own (`training/all_reduce.py`); NCCL reads its protocol once, when it is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from apertus_nemo.selftest.check import FAILED, NOT_CHECKED, OK, Check

PROTOCOLS = ("Simple", "LL", "LL128")  # of NCCL, all that there are
# (bytes, times). Around the lines of LL128 (120 of 128 bytes are data), pages and the slices of a ring.
CPU_MESSAGES = tuple((size, 2) for size in (4, 8, 120, 128, 136, 4096, 4100, 65_536, 1_048_576, 1_048_584))
# 1 MiB is where NVIDIA/nccl#2001 was seen, in about three runs of ten: it is done more often than the others.
GPU_MESSAGES = (
    *((size, 4) for size in (4, 8, 120, 128, 136, 1920, 4096, 4100, 65_536, 262_144, 524_288)),
    *((size, 32) for size in (1_048_576, 1_048_584)),
    *((size, 4) for size in (4_194_304, 16_777_216, 67_108_864)),
)
# Names by which one plugin is known: aws-ofi-nccl, src/nccl_ofi_interface_nvidia.cpp.
ALIASES = {"Libfabric": ("Libfabric", "AWS Libfabric", "OFI")}

_USING = re.compile(r"Using network (.+?)\s*$", re.MULTILINE)
_NO_PROTOCOL = re.compile(r"no algorithm/protocol available", re.IGNORECASE)
_POLL_S = 0.02


@dataclass(frozen=True)
class Ended:
    """What one rank left."""

    code: int | None  # None: it did not end in time
    answer: str
    said: str


def all_reduce(
    backend: str,
    *,
    ranks: int,
    messages: Sequence[tuple[int, int]],
    environment: Mapping[str, str],
    limit_s: float,
    protocol: str | None = None,
) -> tuple[Check, str]:
    """The check, and what NCCL logged. `protocol`: of NCCL, which is then on GPUs."""
    name = f"all-reduce {backend}" + (f" {protocol}" if protocol else "")
    device = "cpu" if backend == "gloo" else "cuda"
    plan = {"backend": backend, "device": device, "limit_s": limit_s, "messages": [list(one) for one in messages]}
    with tempfile.TemporaryDirectory(prefix="apertus-nemo-selftest-") as folder:
        more = {"ALL_REDUCE": json.dumps(plan), "RENDEZVOUS_FILE": f"{folder}/rendezvous"}
        if protocol is not None:
            more |= {"NCCL_PROTO": protocol, "NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"}
            more |= {"NCCL_DEBUG_FILE": f"{folder}/nccl.%p.log"}
        ended = _run(ranks, {**environment, **more}, limit_s, Path(folder))
        log = "\n".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob("nccl.*.log")))
    return _judged(name, ranks, ended, limit_s), log


def _judged(name: str, ranks: int, ended: Sequence[Ended], limit_s: float) -> Check:
    if any(_NO_PROTOCOL.search(one.said) for one in ended):
        return Check(name, NOT_CHECKED, "NCCL offers it on no connection of these GPUs")
    wrong, done = [], 0
    for rank, one in enumerate(ended):
        if one.code != 0:
            last = [line for line in one.said.splitlines() if line.strip()][-1:] or ["without a word"]
            how = f"did not end within {limit_s:.0f} s" if one.code is None else f"ended with {one.code}"
            wrong.append((one.code in (None, -signal.SIGKILL), f"rank {rank} {how}: {last[0][:300]}"))
            continue
        answer = json.loads(one.answer)
        done = answer["done"]
        wrong += [(False, f"rank {rank}: {text}") for text in answer["wrong"][:3]]
    if wrong:  # those that were ended here come last: another one was first
        return Check(name, FAILED, min(wrong, key=lambda pair: pair[0])[1])
    return Check(name, OK, f"{done} sums over {ranks} ranks, each exactly as it must be")


def _run(ranks: int, environment: Mapping[str, str], limit_s: float, folder: Path) -> list[Ended]:
    """Start the ranks and see them end; none is left."""
    deadline = time.monotonic() + limit_s
    with contextlib.ExitStack() as stack:
        outputs = [
            [stack.enter_context(open(folder / f"{kind}-{rank}", "w+b")) for kind in ("out", "err")]
            for rank in range(ranks)
        ]
        processes = [stack.enter_context(_started(rank, ranks, environment, outputs[rank])) for rank in range(ranks)]
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if time.monotonic() > deadline or failed:
                break
            time.sleep(_POLL_S)
        codes = [process.poll() for process in processes]
        time.sleep(0.5 if any(codes) else 0.0)  # what the others have to say
        for process in processes:
            _kill(process)
        return [Ended(code, _read(out), _read(err)) for code, (out, err) in zip(codes, outputs, strict=True)]


@contextlib.contextmanager
def _started(
    rank: int, ranks: int, environment: Mapping[str, str], outputs: Sequence[BinaryIO]
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-s", "-m", "apertus_nemo.training.all_reduce", str(os.getpid())],
        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
        stdin=subprocess.DEVNULL,
        stdout=outputs[0],
        stderr=outputs[1],
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(stream: BinaryIO) -> str:
    stream.seek(0)
    return stream.read()[-20_000:].decode(errors="replace")


def network_plugin(wanted: str | None, log: str) -> Check:
    """Whether NCCL uses the network that the definition names, by what it logged ("Using network ...").

    A plugin that is missing or does not fit ends no run: NCCL goes on over TCP, at a fraction of the speed.
    """
    name, used = "network plugin", sorted(set(_USING.findall(log)))
    if wanted is None:
        seen = f"; NCCL uses {', '.join(used)}" if used else ""
        return Check(name, NOT_CHECKED, f"the definition names none{seen}")
    if not used:
        return Check(name, FAILED, f"NCCL did not say which network it uses; it should be {wanted}")
    if any(one not in ALIASES.get(wanted, (wanted,)) for one in used):
        return Check(name, FAILED, f"NCCL uses {', '.join(used)}, the definition says {wanted}")
    return Check(name, OK, f"NCCL uses {', '.join(used)}")
