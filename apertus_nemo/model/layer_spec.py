"""Layer specifications: which module computes what. Chosen by the recipe, never swapped silently.

    local_spec(config, model)               plain Megatron with our norm, attention and xIELU; CPU or GPU
    transformer_engine_spec(config, model)  Transformer Engine's fused modules with our xIELU; GPU, production

`config` is Megatron's TransformerConfig, `model` the recipe's.
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.model.attention import CoreAttention, packed
from apertus_nemo.model.norm import RMSNorm
from apertus_nemo.model.xielu import XIELU
from apertus_nemo.recipe.schema import ModelConfig

LAYER_SPECS = ("local", "transformer_engine")


def _xielu(model: ModelConfig) -> Any:
    params = {
        "beta": model.xielu_beta,
        "eps": model.xielu_eps,
        "tensor_parallel_gradient": model.xielu_tensor_parallel_gradient,
    }
    return ModuleSpec(module=XIELU, params=params)


def check_layer_spec(name: str) -> None:
    """Raise InputError for an unknown name, and UnfitEnvironment where the named one cannot run here."""
    if name not in LAYER_SPECS:
        raise InputError(f"model.layer_spec is {name!r}: must be one of {', '.join(LAYER_SPECS)}")
    if name == "local":
        return
    remedy = "install Transformer Engine >= 1.9, or choose model.layer_spec=local"
    try:
        import transformer_engine  # noqa: F401
    except ImportError as error:
        raise UnfitEnvironment(
            f"model.layer_spec is 'transformer_engine', which cannot be imported ({error}): {remedy}"
        ) from error
    from megatron.core.utils import is_te_min_version

    if not is_te_min_version("1.9.0"):
        raise UnfitEnvironment(f"model.layer_spec is 'transformer_engine', whose version is below 1.9: {remedy}")


def _block(config: Any, layer: Any, final_norm: Any, vp_stage: int | None) -> Any:
    """The layers of one model chunk, and the norm behind the last."""
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=final_norm)


def local_spec(config: Any, model: ModelConfig, vp_stage: int | None = None) -> Any:
    """Plain Megatron: `TransformerBlockSubmodules` for one model chunk of an Apertus model."""
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=RMSNorm,
                    k_layernorm=RMSNorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, activation_func=_xielu(model), linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            # checkpoints carry Transformer Engine's names, so that either specification reads them
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    return _block(config, layer, RMSNorm, vp_stage)


def transformer_engine_spec(config: Any, model: ModelConfig, vp_stage: int | None = None) -> Any:
    """Transformer Engine: `TransformerBlockSubmodules` for one model chunk of an Apertus model.

    The two norms of a layer are fused into the linears behind them. Raises UnfitEnvironment where Transformer
    Engine is not installed, or is older than 1.9, whose norm is not fit for queries and keys (Megatron's remark).
    """
    check_layer_spec("transformer_engine")
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=TELayerNormColumnParallelLinear,
                    core_attention=packed(TEDotProductAttention),
                    linear_proj=TERowParallelLinear,
                    q_layernorm=TENorm,
                    k_layernorm=TENorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=TELayerNormColumnParallelLinear,
                    activation_func=_xielu(model),
                    linear_fc2=TERowParallelLinear,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return _block(config, layer, TENorm, vp_stage)


def layer_spec(config: Any, model: ModelConfig, vp_stage: int | None = None) -> Any:
    """The specification that the recipe names (`model.layer_spec`)."""
    check_layer_spec(model.layer_spec)
    return (local_spec if model.layer_spec == "local" else transformer_engine_spec)(config, model, vp_stage)
