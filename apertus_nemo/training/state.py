"""The state digest of a running training: every logical tensor, from every rank's shards.

Weights have their published names; each optimizer state is a kind of its own under the same name. What the
lanes are: docs/state-digest.md; which block of which tensor a rank holds: `model/layout.py`.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state

from apertus_nemo.model.config import layer_offset
from apertus_nemo.model.layout import Piece, held_shapes, pieces
from apertus_nemo.optim.ademamix import STATES
from apertus_nemo.optim.module import logical_states
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.record.state import StateDigest
from apertus_nemo.training.digest import Contribution, collect, parameter_contributions, shard_contributions


def state_digest(trainer: pl.Trainer, run: RunConfig, step: int) -> StateDigest:
    """Weights and all optimizer states after `step`; collective, and the same on every rank.

    Raises Differs where ranks that hold copies of a tensor hold different bits.
    """
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    expected = held_shapes(run.model, tp_size)
    found: list[Contribution] = []
    layout: dict[tuple[int, str], tuple[tuple[int, ...], tuple[Piece, ...]]] = {}
    strategy: Any = trainer.strategy
    for index, chunk in enumerate(strategy.megatron_parallel):
        model = chunk.module
        while hasattr(model, "module"):  # DistributedDataParallel, Float16Module
            model = model.module
        offset = layer_offset(model)
        for name, parameter in model.named_parameters():
            every = pieces(name, run.model, tp_rank=tp_rank, tp_size=tp_size, layer_offset=offset)
            held = tuple(piece for piece in every if piece.name in expected)
            layout[index, name] = tuple(parameter.shape), held
            found += parameter_contributions(parameter.detach(), held, "weight")
    for optimizer in trainer.optimizers:
        for index, name, kind, shard, (start, _) in logical_states(optimizer):
            shape, held = layout[index, name]
            found += shard_contributions(shard.detach(), start, shape, held, kind)
    kinds = ["weight", *STATES] + (["master"] if run.trainer.precision == "bf16" else [])
    tensors = collect(found, expected=expected, kinds=kinds)
    return StateDigest.of(step, tensors.values())
