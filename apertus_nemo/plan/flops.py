"""Floating point operations of a run.

Matrix products alone, two operations for a multiply-add, the backward pass at twice the forward one, attention over the
whole sequence (no half for the causal mask): the convention of PaLM's appendix B (arXiv 2204.02311) and of Megatron.
With it Apertus 70B needs 6.74e24 for 15T tokens, which is what arXiv 2509.14233 (section 2.6) states.

Beside adapters, weights are frozen: the backward pass takes gradients through them, and none of them.
"""

from __future__ import annotations

from apertus_nemo.model.adapter_layout import adapter_parameter_count
from apertus_nemo.recipe.schema import AdapterConfig, ModelConfig, RunConfig
from apertus_nemo.recipe.stages import StagePlan


def forward_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Of one token in a sample of `seq_length`; the embedding is a look-up and costs nothing."""
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_query_groups * model.head_dim
    layer = 2 * model.hidden_size * (queries + 2 * keys)  # query, key, value
    layer += attention_flops_per_token(model, seq_length) // model.num_layers
    layer += 2 * queries * model.hidden_size  # output projection
    layer += 2 * 2 * model.hidden_size * model.ffn_hidden_size  # up and down; not gated
    return model.num_layers * layer + 2 * model.hidden_size * model.vocab_size


def attention_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Of scores, and of values weighted by them, in all layers: no weight takes part."""
    return model.num_layers * 2 * 2 * seq_length * model.num_attention_heads * model.head_dim


def training_flops_per_token(model: ModelConfig, seq_length: int, adapter: AdapterConfig | None = None) -> int:
    """Forward and backward; what is computed again for want of memory is no work of the model's."""
    forward = forward_flops_per_token(model, seq_length)
    if adapter is None or adapter.kind == "none":
        return 3 * forward
    return 2 * forward + attention_flops_per_token(model, seq_length) + 6 * adapter_parameter_count(model, adapter)


def run_flops(run: RunConfig, samples: int) -> int:
    """Of the first `samples` samples of a run, each at the length of its stage."""
    stages = StagePlan.from_config(run).stages
    counts = (max(0, min(stage.to_sample, samples) - stage.from_sample) * stage.seq_length for stage in stages)
    return sum(
        n * training_flops_per_token(run.model, s.seq_length, run.adapter) for n, s in zip(counts, stages, strict=True)
    )
