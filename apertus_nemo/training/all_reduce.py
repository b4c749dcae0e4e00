"""All-reduce held against sums that are known exactly: `python -m apertus_nemo.training.all_reduce LAUNCHER`.

A rank's part of the collective self-test. The environment says RANK, LOCAL_RANK, WORLD_SIZE, RENDEZVOUS_FILE, and in
ALL_REDUCE the plan: {"backend", "device", "limit_s", "messages": [[bytes, times], ...]}. It prints one JSON line.

Every rank contributes small integers that depend on rank, position and round. Their sums, and all partial sums in
whatever order, are integers that the type holds exactly, so there is no tolerance: one wrong, old or misplaced element
shows. NCCL gave wrong sums on Slingshot without an error (NVIDIA/nccl#2001); this is what would have seen it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from apertus_nemo.training.worker import die_with_launcher

# Type -> integers that it holds exactly: up to 2^24 and 2^8 (significands of 24 and 8 bits).
TYPES: dict[torch.dtype, int] = {torch.float32: 2**24, torch.bfloat16: 2**8}
_SHOWN = 3


def contribution(size: int, rank: int, world_size: int, again: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank gives in a round: (size,) integers in int64, from 0 to `TYPES[dtype] // world_size - 1`."""
    index = torch.arange(size, dtype=torch.int64)
    modulus = TYPES[dtype] // world_size
    # A prime step, and one that grows with the position: neighbours, blocks and pages all differ.
    return (index * 7919 + (index >> 7) * 104729 + rank * 611953 + again * 1299709) % modulus


def check_sums(
    reduce: Callable[[torch.Tensor], None],
    messages: Sequence[tuple[int, int]],
    *,
    rank: int,
    world_size: int,
    device: str,
) -> tuple[int, list[str]]:
    """(number of sums, what was wrong, one line each) of `reduce`, which sums a tensor over the ranks in place.

    `messages` holds (bytes, times) pairs; every one is done in each of TYPES. Collective over the ranks.
    """
    done, wrong = 0, []
    for dtype in TYPES:
        for size_bytes, times in messages:
            size = max(1, size_bytes // dtype.itemsize)
            for again in range(times):
                parts = (contribution(size, each, world_size, again, dtype) for each in range(world_size))
                expected = torch.zeros(size, dtype=torch.int64)
                for each, part in enumerate(parts):
                    expected += part
                    if each == rank:
                        tensor = part.to(dtype).to(device)
                reduce(tensor)
                differs = tensor.to("cpu", torch.float64) != expected.to(torch.float64)
                done += 1
                if bool(differs.any()):
                    where = torch.nonzero(differs).flatten().tolist()
                    at = ", ".join(
                        f"[{place}] is {tensor[place].item():g} instead of {expected[place].item()}"
                        for place in where[:_SHOWN]
                    )
                    name = str(dtype).removeprefix("torch.")
                    wrong.append(f"{name}, {size_bytes} bytes, round {again}: {len(where)} of {size} elements: {at}")
    return done, wrong


def main(arguments: Sequence[str]) -> int:
    """One rank, from the process group to the last sum."""
    die_with_launcher(int(arguments[0]))
    plan: dict[str, Any] = json.loads(os.environ["ALL_REDUCE"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = "cpu"
    if plan["device"] == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(
        plan["backend"],
        init_method=f"file://{os.environ['RENDEZVOUS_FILE']}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=plan["limit_s"]),
    )
    messages = [(int(size), int(times)) for size, times in plan["messages"]]
    done, wrong = check_sums(
        lambda tensor: dist.all_reduce(tensor), messages, rank=rank, world_size=world_size, device=device
    )
    print(json.dumps({"done": done, "wrong": wrong}), flush=True)
    dist.barrier()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # nothing is left to do that a shutdown could hang in
