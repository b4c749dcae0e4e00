"""Which part of the model a rank holds, counted without building anything.

    rank_parameters(run, 0).total        # 2,407,696,896 for the published 70B layout

`build.py` holds these counts against Megatron's own modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from apertus_nemo.errors import InputError
from apertus_nemo.model.adapter_layout import adapter_parameter_count
from apertus_nemo.model.layout import layer_parameter_count
from apertus_nemo.recipe.schema import RunConfig


@dataclass(frozen=True)
class Place:
    """A rank's place in each parallel group; Megatron's order tp-cp-ep-dp-pp, the last one slowest."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int


def place(run: RunConfig, rank: int) -> Place:
    """Where a global rank stands. Raises InputError for a rank that the run does not have."""
    if not 0 <= rank < run.world_size:
        raise InputError(f"there is no rank {rank}: the run has ranks 0 to {run.world_size - 1}")
    tp = run.parallel.tensor_model_parallel_size
    cp = run.parallel.context_parallel_size
    dp = run.data_parallel_size
    return Place(rank, rank % tp, rank // tp % cp, rank // (tp * cp) % dp, rank // (tp * cp * dp))


def chunk_layers(run: RunConfig) -> int:
    """Transformer layers of one model chunk: of a stage, or of a virtual stage."""
    p = run.parallel
    return run.model.num_layers // (p.pipeline_model_parallel_size * (p.virtual_pipeline_model_parallel_size or 1))


def layer_parameters(run: RunConfig) -> int:
    """Parameters of one layer on one tensor-parallel rank: matrices are cut, vectors and xIELU's scalars are not."""
    model, tp = run.model, run.parallel.tensor_model_parallel_size
    whole = 2 * model.hidden_size + 2 * model.head_dim + 2  # both norms, both QK-norms, alpha_p and alpha_n
    return (layer_parameter_count(model) - whole) // tp + whole


@dataclass(frozen=True)
class RankParameters:
    """Parameters of the model that one rank holds, without adapters."""

    layers: int
    embedding: int
    output: int  # output layer and final norm

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers + self.embedding + self.output


def rank_parameters(run: RunConfig, rank: int) -> RankParameters:
    """Parameters of a rank, counted by the rules of the layout (`model/layout.py`)."""
    model, p = run.model, run.parallel
    stage = place(run, rank).pp
    vocabulary = model.vocab_size * model.hidden_size // p.tensor_model_parallel_size
    last = stage == p.pipeline_model_parallel_size - 1
    return RankParameters(
        layers=layer_parameters(run) * (model.num_layers // p.pipeline_model_parallel_size),
        embedding=vocabulary if stage == 0 else 0,
        output=vocabulary + model.hidden_size if last else 0,
    )


def rank_adapter_parameters(run: RunConfig) -> int:
    """Parameters of adapters on a rank: every matrix is cut over tensor-parallel ranks; 0 where there are none."""
    p = run.parallel
    return (
        adapter_parameter_count(run.model, run.adapter)
        // p.tensor_model_parallel_size
        // p.pipeline_model_parallel_size
    )


def rank_trained_parameters(run: RunConfig, rank: int) -> int:
    """What a rank has gradients and optimizer states of: adapters where there are some, else all that it holds."""
    return rank_parameters(run, rank).total if run.adapter.kind == "none" else rank_adapter_parameters(run)
