"""Ranks of the self-test's all-reduce, with a sum that is right or one that is not."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from apertus_nemo.training.all_reduce import TYPES, check_sums, contribution


def sums(rank: int, world_size: int, *, fault: str) -> dict[str, Any]:
    """What `check_sums` says of all-reduce with a fault on the last rank: one of "", "element", "late", "moved"."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS_FILE']}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    before: list[torch.Tensor] = []

    def reduce(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)
        if rank != world_size - 1 or tensor.numel() < 1000:
            return
        if fault == "element":
            tensor[700] += 1
        elif fault == "late":  # the sum of the round before
            now = tensor.clone()
            if before and before[0].shape == tensor.shape:
                tensor.copy_(before[0])
            before[:] = [now]
        elif fault == "moved":  # a line of 128 bytes in the place of the next
            line = 128 // tensor.element_size()
            tensor[line : 2 * line] = tensor[:line].clone()

    messages = [(4, 1), (4096, 2), (65_536, 2)]
    done, wrong = check_sums(reduce, messages, rank=rank, world_size=world_size, device="cpu")
    exact = all(
        torch.equal(part.to(dtype).to(torch.int64), part)
        for dtype in TYPES
        for part in [sum(contribution(5000, each, world_size, 3, dtype) for each in range(world_size))]
        if isinstance(part, torch.Tensor)
    )
    dist.barrier()
    return {"done": done, "wrong": wrong, "exact": exact}
