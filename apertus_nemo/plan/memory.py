"""Memory of one rank while it trains, in bytes.

Weights follow from the parameters, gradients and optimizer states from those that are trained. Activations are what
autograd keeps for the backward pass of one layer, times the layers whose forward pass is done and whose backward pass
is not. Counting follows arXiv 2205.05198 (Korthikanti et al.), section 4, for Apertus' layer: RMSNorm, QK-norm, no
gate, xIELU that keeps its input, attention that keeps no scores (Transformer Engine).

Not counted: the CUDA context, NCCL's buffers, workspaces of cuBLAS, fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

from apertus_nemo.plan.ranks import (
    chunk_layers,
    place,
    rank_adapter_parameters,
    rank_parameters,
    rank_trained_parameters,
)
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan

_FP32 = 4
_STATES = 3  # AdEMAMix: exp_avg_fast, exp_avg_slow, exp_avg_sq; float32 each


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, at the moment when most is held."""

    weights: int
    gradients: int
    optimizer: int  # this rank's shard of three states, and in bf16 of the float32 weights
    activations: int
    output: int  # logits and their softmax, on the rank that has the output layer

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.output


def element_bytes(run: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if run.trainer.precision == "bf16" else _FP32


def optimizer_bytes_per_parameter(run: RunConfig) -> int:
    """Of all shards together: three states, and float32 master weights beside weights in bf16."""
    return _STATES * _FP32 + (_FP32 if run.trainer.precision == "bf16" else 0)


def layer_bytes_per_token(run: RunConfig) -> int:
    """What one layer keeps of one token for the backward pass, on one tensor-parallel rank; not computed again.

    Of the attention it counts what Transformer Engine's keeps: inputs, output and the logarithm of each row's sum.
    Tensors outside the tensor-parallel regions, hidden_size wide, are cut with sequence parallelism only.
    """
    model, p, width = run.model, run.parallel, element_bytes(run)
    tp = p.tensor_model_parallel_size
    shared = tp if p.sequence_parallel else 1
    heads, groups = model.num_attention_heads, model.num_query_groups
    queries, keys = heads * model.head_dim, groups * model.head_dim
    outside = 4 * model.hidden_size * width  # inputs of both norms, and of the linears behind them
    inside = width * (
        (queries + 2 * keys)  # query, key and value in one; the norm of the keys, and the values, keep all of it
        + (queries if groups > tp else 0)  # the queries once more: reshaping those of several groups copies them
        + (queries + keys)  # after RoPE, kept by the attention
        + queries  # output of the attention, which is the input of its projection
        + 2 * model.ffn_hidden_size  # input and output of xIELU
    )
    roots = 2 * _FP32 // shared + (heads + groups) * _FP32 // tp  # one number a row that was normalised
    return outside // shared + (inside + heads * _FP32) // tp + roots


def plain_attention_bytes_per_token(run: RunConfig) -> int:
    """What the attention of plain layers keeps beyond that: probabilities, and its inputs, in float32 for each head."""
    model = run.model
    if model.layer_spec != "local":
        return 0
    width = StagePlan.from_config(run).max_seq_length + 3 * model.head_dim
    return model.num_attention_heads * width * _FP32 // run.parallel.tensor_model_parallel_size


def adapter_bytes_per_token(run: RunConfig) -> int:
    """What the adapters of one layer keep of one token beyond that: A x, and inputs gathered for them.

    With sequence parallelism, the adapters of layers whose output rows are cut keep their input whole, hidden_size
    wide.
    Inputs of frozen layers are counted as those of trained ones: the adapters keep them.
    """
    adapter, model = run.adapter, run.model
    if adapter.kind == "none":
        return 0
    gathered = [target for target in ("linear_qkv", "linear_fc1") if target in adapter.targets]
    whole = len(gathered) * model.hidden_size if run.parallel.sequence_parallel else 0
    return (len(adapter.targets) * adapter.rank + whole) * element_bytes(run)


def layer_input_bytes_per_token(run: RunConfig) -> int:
    """All that is kept of a layer that is computed again as a whole."""
    shared = run.parallel.tensor_model_parallel_size if run.parallel.sequence_parallel else 1
    return run.model.hidden_size * element_bytes(run) // shared


def chunks_in_flight(run: RunConfig, stage: int, micro_batches: int) -> int:
    """Forward passes of model chunks whose backward pass is still to come, at most, on a pipeline stage.

    Megatron's schedules (core/pipeline_parallel/schedules.py): one forward, one backward after a warm-up of
    (stages behind) micro-batches, and interleaved of 2 (stages behind) + (virtual - 1) stages chunks.
    """
    p = run.parallel
    stages, virtual = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size or 1
    behind = stages - 1 - stage
    warm_up = behind if virtual == 1 else 2 * behind + (virtual - 1) * stages
    return min(warm_up + 1, micro_batches * virtual)


def rank_memory(run: RunConfig, rank: int, *, micro_batches: int, recompute: str = "none") -> Memory:
    """Memory of a rank in a step of so many micro-batches a replica.

    `recompute`: "none", or "full" (each layer keeps its input, and one layer at a time is computed again).
    """
    model, p, width = run.model, run.parallel, element_bytes(run)
    parameters = rank_parameters(run, rank)
    at = place(run, rank)
    tokens = run.trainer.micro_batch_size * StagePlan.from_config(run).max_seq_length // p.context_parallel_size
    flying = chunks_in_flight(run, at.pp, micro_batches) * chunk_layers(run)
    layer = layer_bytes_per_token(run) + plain_attention_bytes_per_token(run) + adapter_bytes_per_token(run)
    if recompute == "full":
        activations = (flying * layer_input_bytes_per_token(run) + layer) * tokens
    else:
        activations = flying * layer * tokens
    output = 0
    if parameters.output:
        # logits in the weights' type, in float32, and the softmax that the loss keeps in float32
        output = tokens * model.vocab_size // p.tensor_model_parallel_size * (width + 2 * _FP32)
    trained = rank_trained_parameters(run, rank)
    shards = run.data_parallel_size * p.context_parallel_size if p.distributed_optimizer else 1
    return Memory(
        weights=(parameters.total + rank_adapter_parameters(run)) * width,
        gradients=trained * _FP32,
        optimizer=-(-trained // shards) * optimizer_bytes_per_parameter(run),
        activations=activations,
        output=output,
    )
