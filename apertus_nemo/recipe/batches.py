"""Batch geometry: which samples belong to which step, on any rank, across changes of the batch size.

    plan = BatchPlan.from_config(config)
    plan.num_steps                      # steps in the whole run
    plan.batch_at(step)                 # (first sample, global batch size) of a 1-based step

Samples are numbered from 0 in the order of training. Step s (1-based) consumes
[first, first + global_batch_size). Rank r of the data-parallel group of size d sees, in micro-batch j,
the samples first + j * m * d + r * m ... + m: Megatron's order for `dataloader_type="single"`.
A change of the batch size must fall on a boundary between two steps (`check` refuses anything else).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from apertus_nemo.recipe.schema import RunConfig


@dataclass(frozen=True)
class BatchPlan:
    """Piecewise constant batch size. All tuples have one entry a piece, in order."""

    starts: tuple[int, ...]  # first sample of the piece
    sizes: tuple[int, ...]  # global batch size in the piece
    train_samples: int

    @classmethod
    def from_config(cls, config: RunConfig) -> BatchPlan:
        """The plan of a resolved recipe."""
        ramp = config.schedule.batch_ramp
        return cls(
            starts=(0, *(step.from_sample for step in ramp)),
            sizes=(config.trainer.global_batch_size, *(step.global_batch_size for step in ramp)),
            train_samples=config.schedule.train_samples,
        )

    def _steps_before(self) -> list[int]:
        """Steps completed before each piece, and at the end of the run (last piece rounded down)."""
        steps = [0]
        ends = (*self.starts[1:], self.train_samples)
        for start, size, end in zip(self.starts, self.sizes, ends, strict=True):
            steps.append(steps[-1] + max(0, min(end, self.train_samples) - start) // size)
        return steps

    @property
    def num_steps(self) -> int:
        """Steps in the whole run; samples that do not fill the last batch are not consumed."""
        return self._steps_before()[-1]

    def batch_at(self, step: int) -> tuple[int, int]:
        """(first sample, global batch size) of the 1-based step."""
        before = self._steps_before()
        piece = min(bisect.bisect_right(before, step - 1) - 1, len(self.sizes) - 1)
        return self.starts[piece] + (step - 1 - before[piece]) * self.sizes[piece], self.sizes[piece]

    def size_at(self, sample: int) -> int:
        """Global batch size of the step that consumes a sample."""
        return self.sizes[max(0, bisect.bisect_right(self.starts, sample) - 1)]

    def steps_before(self, sample: int) -> int:
        """Steps that are done when `sample` samples were consumed, which is at the boundary of a step."""
        before = self._steps_before()
        piece = max(0, bisect.bisect_right(self.starts, sample) - 1)
        return before[piece] + (min(sample, self.train_samples) - self.starts[piece]) // self.sizes[piece]

    def consumed_samples(self, step: int) -> int:
        """Samples consumed once the 1-based step is done; 0 for step 0."""
        if step == 0:
            return 0
        first, size = self.batch_at(step)
        return first + size
