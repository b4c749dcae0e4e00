"""The state digest of a running training: every logical tensor, from every rank's shards.

Weights have their published names; each optimizer state is a kind of its own under the same name. What the
lanes are: docs/state-digest.md; which block of which tensor a rank holds: `model/layout.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state

from apertus_nemo.model.adapter_layout import adapter_pieces, adapter_shapes, base_name, is_adapter_parameter
from apertus_nemo.model.config import layer_offset
from apertus_nemo.model.layout import Piece, held_shapes, pieces
from apertus_nemo.optim.ademamix import STATES
from apertus_nemo.optim.module import logical_states
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.record.state import StateDigest, TensorDigest
from apertus_nemo.training.digest import Contribution, collect, parameter_contributions, shard_contributions


def state_digest(trainer: pl.Trainer, run: RunConfig, step: int) -> StateDigest:
    """What is trained, and all its optimizer states, after `step`; collective, and the same on every rank.

    With adapters, the frozen weights are part of the state of step 0 alone: see `frozen_weights`.

    Raises Differs where ranks that hold copies of a tensor hold different bits.
    """
    adapters = run.adapter.kind != "none"
    expected = adapter_shapes(run.model, run.adapter) if adapters else _shapes(run)
    found: list[Contribution] = []
    layout: dict[tuple[int, str], tuple[tuple[int, ...], tuple[Piece, ...]]] = {}
    for index, name, parameter, held in _held(trainer, run):
        if adapters and not is_adapter_parameter(name):
            continue
        held = tuple(piece for piece in held if piece.name in expected)
        layout[index, name] = tuple(parameter.shape), held
        found += parameter_contributions(parameter.detach(), held, "weight")
    for optimizer in trainer.optimizers:
        for index, name, kind, shard, (start, _) in logical_states(optimizer):
            shape, held = layout[index, name]
            found += shard_contributions(shard.detach(), start, shape, held, kind)
    kinds = ["weight", *STATES] + (["master"] if run.trainer.precision == "bf16" else [])
    tensors = [*collect(found, expected=expected, kinds=kinds).values()]
    if adapters and step == 0:
        tensors += frozen_weights(trainer, run)
    return StateDigest.of(step, tensors)


def frozen_weights(trainer: pl.Trainer, run: RunConfig) -> list[TensorDigest]:
    """The weights that stand beside adapters, sorted; collective, and the same on every rank."""
    expected = _shapes(run)
    found: list[Contribution] = []
    for _, name, parameter, held in _held(trainer, run):
        if not is_adapter_parameter(name):
            held = tuple(piece for piece in held if piece.name in expected)
            found += parameter_contributions(parameter.detach(), held, "weight")
    return sorted(collect(found, expected=expected, kinds=["weight"]).values())


def _shapes(run: RunConfig) -> dict[str, tuple[int, ...]]:
    return held_shapes(run.model, parallel_state.get_tensor_model_parallel_world_size())


def _held(trainer: pl.Trainer, run: RunConfig) -> Iterator[tuple[int, str, Any, tuple[Piece, ...]]]:
    """(model chunk, name in the GPTModel, parameter, blocks of logical tensors that make it up) of this rank."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    strategy: Any = trainer.strategy
    for index, chunk in enumerate(strategy.megatron_parallel):
        model = chunk.module
        while hasattr(model, "module"):  # DistributedDataParallel, Float16Module
            model = model.module
        at = {"tp_rank": tp_rank, "tp_size": tp_size, "layer_offset": layer_offset(model)}
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                yield index, name, parameter, adapter_pieces(name, run.model, run.adapter.rank, **at)
            else:
                yield index, name, parameter, pieces(base_name(name), run.model, **at)
