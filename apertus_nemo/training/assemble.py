"""Assembles NeMo's trainer, strategy, model and data from a resolved recipe, and trains."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fiddle
import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from apertus_nemo.data.loader import training_loader
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.training.device import alias_cuda
from apertus_nemo.training.module import ApertusModule
from apertus_nemo.training.sampler import PlanSampler
from apertus_nemo.training.strategy import ApertusStrategy


class Trainer(nl.Trainer):  # type: ignore[misc]
    """NeMo's trainer without the copy of its arguments for NeMo's `context/` folder, which is never written."""

    def io_init(self, **kwargs: Any) -> Any:
        """An empty configuration: the run's lock says what the arguments were."""
        return fiddle.Config(dict)


class RankEnvironment(LightningEnvironment):
    """Rank and world size from the launcher's environment, for Lightning."""

    def __init__(self, rank: int, world_size: int, local_rank: int) -> None:
        super().__init__()
        self._rank, self._world, self._local = rank, world_size, local_rank

    @property
    def creates_processes_externally(self) -> bool:
        """The launcher has started all ranks."""
        return True

    def global_rank(self) -> int:
        """This rank."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Lightning derives the same number; the launcher's holds."""

    def world_size(self) -> int:
        """All ranks."""
        return self._world

    def set_world_size(self, size: int) -> None:
        """Lightning derives the same number; the launcher's holds."""

    def local_rank(self) -> int:
        """This rank's number on its machine."""
        return self._local

    @property
    def main_address(self) -> str:
        """Only used where ranks do not meet through a file."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Only used where ranks do not meet through a file."""
        return int(os.environ.get("MASTER_PORT", "0"))


class DataModel(ApertusModule):
    """ApertusModule that also opens its data, once the process groups exist."""

    def __init__(self, run: RunConfig, corpus: Path, cache: Path, *, first_step: int = 1) -> None:
        """`first_step`: the 1-based step that is done first, one more than a checkpoint's."""
        super().__init__(run)
        self._corpus, self._cache = corpus, cache
        self._first_step = first_step

    def reinit(self) -> DataModel:
        """NeMo's hook: the module of this rank's next virtual pipeline stage, nothing built yet.

        It must be of the same class, since NeMo replaces the classes' `__getattr__`. The first one reads the data.
        """
        stage = DataModel(self.run_config, self._corpus, self._cache, first_step=self._first_step)
        stage.heart, stage.initial = self.heart, self.initial
        return stage

    def train_dataloader(self) -> Any:
        """This rank's micro-batches from the first step on."""
        return training_loader(self.run_config, self._corpus, cache=self._cache, first_step=self._first_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: of the loader, which begins after the checkpoint, nothing was read yet.

        Lightning counts the batches of before as read from it (training_epoch_loop.py, `fetched += current.ready`), and
        would end the run that much too early, without an error.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], 0)
        progress["is_last_batch"] = False


def prepare_process(run: RunConfig) -> None:
    """Deterministic arithmetic on the device that the recipe names; before any tensor exists."""
    _quiet()
    if run.trainer.accelerator == "cpu":
        alias_cuda(ranks=run.trainer.devices)
        torch.set_num_threads(run.reproducibility.threads_per_rank)
        torch.set_num_interop_threads(1)
    if run.reproducibility.level == "bitwise":
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # Megatron fills what it reads; filling fresh memory costs time and hides nothing here.
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False


def build_trainer(
    run: RunConfig, *, rank: int, local_rank: int, rendezvous: Path | None, callbacks: Sequence[pl.Callback]
) -> Trainer:
    """NeMo's trainer for this rank."""
    plan = BatchPlan.from_config(run)
    steps = plan.num_steps if run.trainer.max_steps is None else min(run.trainer.max_steps, plan.num_steps)
    plugins: list[Any] = [RankEnvironment(rank, run.world_size, local_rank)]
    if run.trainer.precision == "bf16":
        plugins.append(
            nl.MegatronMixedPrecision(
                precision="bf16-mixed",
                params_dtype=torch.bfloat16,
                pipeline_dtype=torch.bfloat16,
                autocast_enabled=False,
                grad_reduce_in_fp32=True,
            )
        )
    return Trainer(
        strategy=ApertusStrategy(run, data_sampler=PlanSampler(run), rendezvous=rendezvous),
        accelerator=run.trainer.accelerator,
        devices=run.trainer.devices,
        num_nodes=run.trainer.num_nodes,
        plugins=plugins,
        max_steps=steps,
        max_epochs=1,  # the loader holds the run's micro-batches, once
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )


def _quiet() -> None:
    """Upstream's notes about features that are off by design; errors still show."""
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "nemo_logger", "nv_one_logger", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
