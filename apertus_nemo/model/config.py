"""From a recipe to a Megatron model: TransformerConfig's settings, and the model itself.

    kwargs = transformer_config_kwargs(run)              # plain Megatron, without NeMo
    chunk = build_model(run)                             # GPTModel of this rank, with its initial weights

Megatron's parallel state must be initialised before a model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from apertus_nemo.errors import ApertusError
from apertus_nemo.model.init import initialise
from apertus_nemo.model.layer_spec import check_layer_spec, layer_spec
from apertus_nemo.model.layout import partition_dim
from apertus_nemo.recipe.schema import ModelConfig, RunConfig
from apertus_nemo.recipe.stages import StagePlan


def _check(run: RunConfig) -> None:
    """Refuse, before anything is built, what no module here can do."""
    check_layer_spec(run.model.layer_spec)


def transformer_config_kwargs(run: RunConfig) -> dict[str, Any]:
    """Arguments of Megatron's TransformerConfig for a recipe.

    Every setting that would fuse, compile or draw at random is spelled out.
    Raises InputError or UnfitEnvironment for what cannot be built here.
    """
    _check(run)
    model, parallel = run.model, run.parallel
    on_gpu = run.trainer.accelerator == "gpu"
    dtype = torch.bfloat16 if run.trainer.precision == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        # architecture
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "gated_linear_unit": False,
        # Megatron's MLP builds an activation module only under this name, and then ignores `activation_func`,
        # whose default (gelu) its checks want to see
        "use_te_activation_func": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        # initialisation is ours (init.py)
        "init_method_std": model.init_method_std,
        "perform_initialization": False,
        "use_cpu_initialization": not on_gpu,
        # numbers
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": False,
        "calculate_per_token_loss": False,
        # In 0.15.3 this decides two things: Transformer Engine checks its environment, and the embedding indexes its
        # weight instead of calling F.embedding, whose backward pass is not deterministic on GPUs. On the CPU it is,
        # and index's is not (with several threads).
        "deterministic_mode": on_gpu and run.reproducibility.level == "bitwise",
        # fusions: other numbers, and most are torch.compile, which wants a C++ compiler at run time
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": model.layer_spec == "transformer_engine",
        # memory
        "recompute_granularity": "full" if parallel.recompute == "full" else None,
        "recompute_method": "uniform" if parallel.recompute == "full" else None,
        "recompute_num_layers": 1 if parallel.recompute == "full" else None,
        # parallelism
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # on gloo, other settings are wrong without any error: _check_messages
        "deallocate_pipeline_outputs": on_gpu,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _check_messages(config: Any, run: RunConfig) -> None:
    """Refuse messages between interleaved stages that gloo was seen to get wrong, without any error.

    Seen with megatron-core 0.15.3, torch 2.13.0, `tiny` with 8 micro-batches of one sample of 256 tokens; loss and
    gradient norm of the first step, beside those of one process:

    - PP=2, VPP=2, batched (upstream's default): 8.326992, 5.44828 instead of 8.324264, 1.15069, each time. There, a
      rank's two neighbours are one rank; PP=4, VPP=2 was right;
    - PP=2, VPP=2, overlapped, outputs deallocated: 8.323721, 1.10313, and 8.323105, 1.09345 the next time. An
      output is freed while gloo still sends it. PP=4, VPP=2, 8 layers: 8.327229, 2.98094, and 8.325232, 1.46750,
      instead of 8.327610, 1.53942.

    With as many micro-batches as pipeline ranks, hardly anything is under way at a time, and both were right.
    """
    if run.trainer.accelerator != "cpu" or config.virtual_pipeline_model_parallel_size is None:
        return
    for name, reason in (
        ("batch_p2p_comm", "mixes up messages where both neighbours of a stage are one rank"),
        ("deallocate_pipeline_outputs", "still sends from outputs that Megatron frees"),
    ):
        if getattr(config, name):
            raise ApertusError(
                f"{name}=True with virtual pipeline stages: gloo {reason}: wrong losses, without an error"
            )


def _scale_rotary(chunk: GPTModel, model: ModelConfig) -> None:
    """RoPE scaling of the llama3 kind, with all four of its numbers (GPTModel takes the first alone)."""
    if model.rope_scaling:
        rotary = chunk.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=model.rope_scaling_factor,
            low_freq_factor=model.rope_low_freq_factor,
            high_freq_factor=model.rope_high_freq_factor,
            original_max_position_embeddings=model.rope_original_max_position_embeddings,
        )
        chunk.rotary_scaling = True


def _mark_tensor_parallel(chunk: GPTModel) -> None:
    """Say of each parameter whether it is a slice.

    Megatron does so while it initialises weights, which we skip. Without the mark, the gradient norm and clipping
    would leave out the slices of all tensor-parallel ranks but the first.
    """
    for name, parameter in chunk.named_parameters():
        dim = partition_dim(name)
        parameter.tensor_model_parallel = dim >= 0
        parameter.partition_dim = dim
        parameter.partition_stride = 1


def layer_offset(chunk: GPTModel) -> int:
    """Global index of the first layer of a model chunk; 0 if it has none."""
    layers = chunk.decoder.layers
    return int(layers[0].layer_number) - 1 if len(layers) else 0


def build_model(
    run: RunConfig,
    *,
    config: Any = None,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
    fill: Callable[..., None] | None = None,
) -> GPTModel:
    """This rank's model chunk with its initial weights: the same bits at every sharding.

    `fill` sets them instead of `initialise`: called with the chunk, `run`, tp_rank, tp_size and layer_offset.

    `config` is a TransformerConfig to use instead of one made here. `pre_process` and `post_process` say
    whether the chunk has the embedding and the output layer; left out, they follow from the pipeline stage.
    Under `torch.device("meta")` the model has shapes only. In bf16 the parameters are bf16. Raises ApertusError for
    a `config` whose messages between pipeline stages would be wrong.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ApertusError("build_model: Megatron's parallel state is not initialised")
    if config is None:
        config = TransformerConfig(**transformer_config_kwargs(run))
    _check_messages(config, run)
    if config.virtual_pipeline_model_parallel_size is None:
        vp_stage = None
    elif vp_stage is None:
        vp_stage = 0
    if pre_process is None:
        pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    if post_process is None:
        post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    chunk = GPTModel(
        config,
        transformer_layer_spec=layer_spec(config, run.model, vp_stage),
        vocab_size=run.model.vocab_size,
        max_sequence_length=StagePlan.from_config(run).max_seq_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=run.model.rotary_base,
        rope_scaling=False,  # below
        scatter_embedding_sequence_parallel=True,
        vp_stage=vp_stage,
    )
    _scale_rotary(chunk, run.model)
    _mark_tensor_parallel(chunk)
    (fill or initialise)(
        chunk,
        run,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        layer_offset=layer_offset(chunk),
    )
    return chunk
