"""Floating point operations of a run.

Matrix products alone, two operations for a multiply-add, the backward pass at twice the forward one, attention over the
whole sequence (no half for the causal mask): the convention of PaLM's appendix B (arXiv 2204.02311) and of Megatron.
With it Apertus 70B needs 6.74e24 for 15T tokens, which is what arXiv 2509.14233 (section 2.6) states.
"""

from __future__ import annotations

from apertus_nemo.recipe.schema import ModelConfig, RunConfig
from apertus_nemo.recipe.stages import StagePlan


def forward_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Of one token in a sample of `seq_length`; the embedding is a look-up and costs nothing."""
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_query_groups * model.head_dim
    layer = 2 * model.hidden_size * (queries + 2 * keys)  # query, key, value
    layer += 2 * 2 * seq_length * queries  # scores, and values weighted by them
    layer += 2 * queries * model.hidden_size  # output projection
    layer += 2 * 2 * model.hidden_size * model.ffn_hidden_size  # up and down; not gated
    return model.num_layers * layer + 2 * model.hidden_size * model.vocab_size


def training_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Forward and backward; what is computed again for want of memory is no work of the model's."""
    return 3 * forward_flops_per_token(model, seq_length)


def run_flops(run: RunConfig, samples: int) -> int:
    """Of the first `samples` samples of a run, each at the length of its stage."""
    stages = StagePlan.from_config(run).stages
    counts = (max(0, min(stage.to_sample, samples) - stage.from_sample) * stage.seq_length for stage in stages)
    return sum(n * training_flops_per_token(run.model, s.seq_length) for n, s in zip(counts, stages, strict=True))
