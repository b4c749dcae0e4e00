"""What NeMo asks for an optimizer: AdEMAMix on the distributed optimizer, settings from the recipe.

    model.optim = ApertusOptimizerModule(run)              # run: RunConfig
    apply_schedule(optimizer, run, step, consumed)         # before the forward pass of each step; refuses a step
                                                           # or a sample that is not the optimizer's next one
    for chunk, name, state, shard, span in logical_states(optimizer): ...

`optimizer` is what NeMo holds (`trainer.optimizers[0]`), Megatron's ChainedOptimizer or our own optimizer.
Learning rate, alpha and beta3 are set by the optimizer itself, from its step: `apply_schedule` makes them visible
before the step and checks that trainer and optimizer agree where the run stands.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, _get_param_groups_and_buffers
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.optim.ademamix import AdEMAMix
from apertus_nemo.optim.distributed import ApertusDistributedOptimizer, require_megatron
from apertus_nemo.optim.schedule import StepSettings, at_step
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig


class ApertusOptimizerModule(MegatronOptimizerModule):  # type: ignore[misc]
    """Builds the optimizer when NeMo's strategy asks; `config` is Megatron's OptimizerConfig, which NeMo completes."""

    def __init__(self, run: RunConfig) -> None:
        """Raises InputError for a recipe that asks for another optimizer or no distributed one."""
        super().__init__(optimizer_config(run), no_weight_decay_cond=no_weight_decay)
        self._run = run

    def optimizers(self, model: Any) -> list[Any]:
        """`model`: NeMo's MegatronParallel, its chunks wrapped by Megatron's DistributedDataParallel."""
        return [McoreDistributedOptimizer(build_optimizer([chunk.module for chunk in model], self._run, self.config))]


def optimizer_config(run: RunConfig) -> OptimizerConfig:
    """The part of a recipe that Megatron's own code reads. Raises InputError for what we do not do."""
    if run.optim.name != "ademamix":
        raise InputError(f"optim.name is {run.optim.name}: only ademamix is known")
    if not run.parallel.distributed_optimizer:
        raise InputError(
            "parallel.distributed_optimizer is false: AdEMAMix needs the distributed optimizer, set it to true"
        )
    bf16 = run.trainer.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",  # the only name that OptimizerConfig knows for an optimizer with averages; nothing reads it
        lr=run.optim.lr,
        min_lr=run.optim.min_lr,
        weight_decay=run.optim.weight_decay,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=run.parallel.overlap_param_gather,
        clip_grad=run.optim.clip_grad,
    )


def no_weight_decay(name: str, parameter: torch.nn.Parameter) -> bool:
    """True for vectors, biases and xIELU's scalars; embeddings, the output layer and every matrix decay."""
    return parameter.dim() <= 1 or name.endswith((".bias", "alpha_p", "alpha_n"))


def build_optimizer(chunks: list[Any], run: RunConfig, config: OptimizerConfig | None = None) -> ChainedOptimizer:
    """AdEMAMix over model chunks wrapped by Megatron's DistributedDataParallel; collective over all ranks.

    The counterpart of megatron-core 0.15.3 `optimizer/__init__.py` l.456-661 for one dense optimizer. Its result is a
    ChainedOptimizer of one, as upstream's: that one computes the gradient norm even where nothing is clipped.
    """
    require_megatron()
    config = config or optimizer_config(run)
    groups, buffers = _get_param_groups_and_buffers(
        chunks,
        model_chunk_offset=0,
        config=config,
        no_weight_decay_cond=no_weight_decay,
        scale_lr_cond=None,
        lr_mult=1.0,
        filter_fn=lambda group: True,
        buffer_name="buffers",
    )
    for group in groups:
        group["weight_decay"] = run.optim.weight_decay * group["wd_mult"]
    ademamix = AdEMAMix(
        groups,
        beta1=run.optim.beta1,
        beta2=run.optim.beta2,
        eps=run.optim.eps,
        weight_decay=run.optim.weight_decay,
        schedule=functools.partial(_settings, run),
    )
    process_groups = ProcessGroupCollection.setup_process_groups_for_optimizer(None, chunks, False)
    optimizer = ApertusDistributedOptimizer(
        ademamix,
        config,
        chunks,
        per_model_buffers=buffers,
        data_parallel_group=process_groups["intra_dp_cp_group"],
        data_parallel_group_gloo=None,  # used by the layouts that hold two states only
        data_parallel_group_idx=get_pg_rank(process_groups["mp_group"]),
        distributed_optimizer_instance_id=0,
    )
    optimizer.grad_stats_parallel_group = process_groups["intra_dist_opt_group"]
    return ChainedOptimizer([optimizer])


def _settings(run: RunConfig, step: int) -> StepSettings:
    return at_step(run, step)


def distributed_optimizer(optimizer: Any) -> ApertusDistributedOptimizer:
    """Our optimizer inside whatever holds it: NeMo's wrapper, Megatron's chain, or nothing."""
    inner = getattr(optimizer, "mcore_optimizer", optimizer)
    if isinstance(inner, ChainedOptimizer) and len(inner.chained_optimizers) == 1:
        inner = inner.chained_optimizers[0]
    if not isinstance(inner, ApertusDistributedOptimizer):
        raise ApertusError(f"{type(inner).__name__} is not the optimizer that ApertusOptimizerModule builds")
    return inner


def apply_schedule(optimizer: Any, config: RunConfig, step: int, consumed_samples: int) -> StepSettings:
    """Set the learning rate that the 1-based `step` will use, and return what it will use.

    `consumed_samples`: samples consumed before the step. Raises ApertusError unless the step is the optimizer's next
    and the samples are the recipe's: a run that resumed in the wrong place stops here.
    """
    inner = distributed_optimizer(optimizer).optimizer
    if inner.steps_done != step - 1:
        raise ApertusError(f"step {step} is to run, but the optimizer has done {inner.steps_done} steps")
    planned = BatchPlan.from_config(config).consumed_samples(step - 1)
    if consumed_samples != planned:
        raise ApertusError(
            f"{consumed_samples} samples were consumed before step {step}, and the recipe says {planned}"
        )
    settings = at_step(config, step)
    for group in inner.param_groups:
        group["lr"] = settings.lr
    return settings


def logical_states(optimizer: Any) -> Iterator[tuple[int, str, str, torch.Tensor, tuple[int, int]]]:
    """Every optimizer state that this rank owns, by name: see ApertusDistributedOptimizer.logical_states."""
    return distributed_optimizer(optimizer).logical_states()
