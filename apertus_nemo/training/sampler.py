"""Tells Megatron's schedule how many micro-batches a step has and how long they are, across changes of both.

NeMo's `MegatronDataSampler` stops the trainer when the global batch size changes and counts samples from a
calculator that is global to the process. Here all follows from the step, the `BatchPlan` and the `StagePlan`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins.data_sampler import DataSampler
from torch.utils.data import DataLoader

from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan


class PlanStep(MegatronStep):  # type: ignore[misc]
    """NeMo's MegatronStep without distillation, whose shapes upstream asks ModelOpt for in every step."""

    @property
    def adjust_tensor_shapes_fn(self) -> None:
        """Messages between pipeline stages have the shapes that Megatron computes."""
        return None


class PlanSampler(DataSampler):  # type: ignore[misc]
    """A NeMo DataSampler whose geometry is the run's BatchPlan and StagePlan."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._plan = BatchPlan.from_config(run)
        self._stages = StagePlan.from_config(run)

    def setup(self, global_rank: int) -> None:
        """Nothing to prepare: there is no state."""

    def transform_dataloader(self, dataloader: DataLoader[Any], consumed_samples: int = 0) -> DataLoader[Any]:
        """The loader already yields this rank's micro-batches in order."""
        return dataloader

    def num_microbatches(self, step: int) -> int:
        """Micro-batches of one model replica in the 1-based step."""
        _, size = self._plan.batch_at(step)
        return size // (self._run.trainer.micro_batch_size * self._run.data_parallel_size)

    def seq_length(self, step: int) -> int:
        """Tokens of each sample in the 1-based step."""
        return self._stages.at(self._plan.batch_at(step)[0]).seq_length

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Megatron's callback: the shape of the step that begins."""
        now = self.trainer.global_step + 1
        given = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
        given.update(
            seq_length=self.seq_length(now),  # Megatron makes the shapes of messages between pipeline stages from it
            micro_batch_size=self._run.trainer.micro_batch_size,
            num_microbatches=self.num_microbatches(now),
        )
        return PlanStep(**given)
