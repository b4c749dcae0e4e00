"""The DataLoader that feeds a rank: its micro-batches, from any step on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apertus_nemo.data.dataset import training_dataset
from apertus_nemo.data.sampler import MicroBatchSampler
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig


def training_loader(
    run: RunConfig,
    corpus: Path,
    *,
    cache: Path,
    first_step: int = 1,
    dp_rank: int | None = None,
    dp_size: int | None = None,
) -> Any:
    """A torch DataLoader of micro-batches, each tensor stacked to [micro_batch_size, seq_length of the stage].

    It ends after the last step of the plan. Every rank must call it (see `training_dataset`, also for errors).

    Args:
        run: the resolved recipe.
        corpus: a built corpus, verified; with mixtures of built data, the folder of them.
        cache: folder of the sample index, seen by all ranks.
        first_step: 1-based; one more than the last step done, to resume.
        dp_rank, dp_size: this rank's place among the replicas; None: as Megatron's process groups say.
    """
    from torch.utils.data import DataLoader

    if dp_rank is None or dp_size is None:
        from megatron.core import parallel_state

        dp_rank = parallel_state.get_data_parallel_rank()
        dp_size = parallel_state.get_data_parallel_world_size()
    sampler = MicroBatchSampler(
        BatchPlan.from_config(run),
        first_step=first_step,
        micro_batch_size=run.trainer.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    dataset: Any = training_dataset(run, corpus, cache=cache)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=0)  # one process: nothing to seed, nothing to fork
