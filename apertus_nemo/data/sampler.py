"""Which samples a data-parallel rank reads, micro-batch by micro-batch, from any step on."""

from __future__ import annotations

from collections.abc import Iterator

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.batches import BatchPlan


class MicroBatchSampler:
    """A batch sampler for torch's DataLoader, in Megatron's order, across changes of the batch size.

    Each item is the list of `micro_batch_size` global sample indices of one micro-batch of this rank;
    step s yields global_batch_size(s) / (micro_batch_size * dp_size) of them. It keeps no state:
    to resume after step s, make one with first_step = s + 1.

    Raises:
        InputError: a global batch size is not a multiple of micro_batch_size * dp_size.
    """

    def __init__(self, plan: BatchPlan, *, first_step: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
        self.plan = plan
        self.first_step = first_step
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        for size in plan.sizes:
            if size % (micro_batch_size * dp_size):
                raise InputError(
                    f"a global batch of {size} samples does not divide into micro-batches of "
                    f"{micro_batch_size} on {dp_size} replicas: change trainer.global_batch_size, "
                    "schedule.batch_ramp or trainer.micro_batch_size"
                )

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.dp_size
        for step in range(self.first_step, self.plan.num_steps + 1):
            first, size = self.plan.batch_at(step)
            for start in range(first + self.dp_rank * self.micro_batch_size, first + size, stride):
                yield list(range(start, start + self.micro_batch_size))

    def __len__(self) -> int:
        """Micro-batches of this rank from first_step to the end of the run."""
        samples = self.plan.consumed_samples(self.plan.num_steps) - self.plan.consumed_samples(self.first_step - 1)
        return samples // (self.micro_batch_size * self.dp_size)
