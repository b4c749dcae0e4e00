"""`config.json` of ApertusForCausalLM from a recipe's model, and back.

The published fields (transformers 4.57, `models/apertus/configuration_apertus.py`), all written out: the class's own
defaults are of another model (intermediate_size 14336, theta 12e6).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.schema import ModelConfig

_NAMES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}

# field of config.json -> field of ModelConfig, where both mean the same
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
}
_ROPE = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}
# What an Apertus model is, and no recipe decides.
_FIXED: dict[str, Any] = {
    "model_type": "apertus",
    "hidden_act": "xielu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "qk_norm": True,
    "post_norm": False,
    "tie_word_embeddings": False,
}
_OPTIONAL = {"mlp_bias", "qk_norm", "post_norm", "attention_bias", "attention_dropout", "tie_word_embeddings"}


def to_hf(model: ModelConfig, *, dtype: str, tokens: dict[str, int | None]) -> dict[str, Any]:
    """The tree of `config.json`. `dtype` as torch names it; `tokens`: ids of bos, eos and pad."""
    tree = dict(_FIXED)
    tree["architectures"] = ["ApertusForCausalLM"]
    tree |= {theirs: getattr(model, ours) for theirs, ours in _SAME.items()}
    tree["head_dim"] = model.head_dim
    tree["rope_scaling"] = (
        {"rope_type": "llama3", **{theirs: getattr(model, ours) for theirs, ours in _ROPE.items()}}
        if model.rope_scaling
        else None
    )
    tree["initializer_range"] = model.init_method_std
    tree["use_cache"] = True
    tree["torch_dtype"] = _NAMES[dtype]
    tree |= {f"{name}_token_id": tokens.get(name) for name in ("bos", "eos", "pad")}
    return tree


def from_hf(tree: Any, like: ModelConfig, *, what: str) -> ModelConfig:
    """The model of a `config.json`; what that file does not say is as in `like`.

    Raises InputError, beginning with `what`, for another architecture or a field that Apertus cannot have.
    """
    if not isinstance(tree, dict):
        raise InputError(f"{what}: is no JSON object")
    if tree.get("model_type") != "apertus":
        raise InputError(f"{what}: model_type is {tree.get('model_type')!r}, and only 'apertus' is converted")
    for name, value in _FIXED.items():
        found = tree.get(name, value if name in _OPTIONAL else None)
        if found != value:
            raise InputError(f"{what}: {name} is {found!r}, and an Apertus model has {value!r}")
    values: dict[str, Any] = {}
    for theirs, ours in _SAME.items():
        values[ours] = _number(tree, theirs, type(getattr(like, ours)), what)
    heads = values["num_attention_heads"]
    head_dim = tree.get("head_dim") or (values["hidden_size"] // heads if heads else 0)
    values["head_dim"] = head_dim
    scaling = tree.get("rope_scaling")
    values["rope_scaling"] = scaling is not None
    if scaling is not None:
        if not isinstance(scaling, dict) or scaling.get("rope_type") != "llama3":
            raise InputError(f"{what}: rope_scaling is not of the kind 'llama3'")
        for theirs, ours in _ROPE.items():
            values[ours] = _number(scaling, theirs, type(getattr(like, ours)), f"{what}: rope_scaling")
    return dataclasses.replace(like, **values)


def _number(tree: dict[str, Any], name: str, kind: type, what: str) -> Any:
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
        raise InputError(f"{what}: {name} is {value!r}, and a number is wanted")
    return kind(value)
