"""Ranks that hold shards of one state: TP x DP, optimizer states cut over DP, replicas checked."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from apertus_nemo.errors import Differs
from apertus_nemo.model.layout import pieces, published_shapes
from apertus_nemo.recipe.schema import ModelConfig
from apertus_nemo.record.state_digest import as_matrix
from apertus_nemo.training.digest import Contribution, collect, parameter_contributions, shard_contributions

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=10,
)
LOCAL = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "mlp.activation_func.alpha_p",
    "mlp.activation_func.alpha_n",
)
PARAMETERS = (
    "embedding.word_embeddings.weight",
    *(f"decoder.layers.{layer}.{name}" for layer in range(2) for name in LOCAL),
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
KINDS = ("weight", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq")


def published(kind: str) -> dict[str, np.ndarray]:
    """The whole state, the same in every process."""
    generator = np.random.default_rng(KINDS.index(kind))
    shapes = published_shapes(MODEL)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def collected(rank: int, world_size: int, tp_size: int, drift_on: int | None = None) -> dict[str, Any]:
    """Cut the state over this rank's place, collect, and return the lanes by "name kind"; or what was raised."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS_FILE']}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    tp_rank, dp_rank, dp_size = rank % tp_size, rank // tp_size, world_size // tp_size
    found: list[Contribution] = []
    for kind in KINDS:
        whole = published(kind)
        for parameter in PARAMETERS:
            held = pieces(parameter, MODEL, tp_rank=tp_rank, tp_size=tp_size)
            rows, cols = (max(getattr(piece, side)[1] for piece in held) for side in ("local_rows", "local_cols"))
            local = np.zeros((rows, cols), dtype=np.float32)
            for piece in held:
                block = as_matrix(whole[piece.name])[slice(*piece.rows), slice(*piece.cols)]
                local[slice(*piece.local_rows), slice(*piece.local_cols)] = block
            if rank == drift_on and parameter.endswith("final_layernorm.weight") and kind == "weight":
                local[0, 3] = np.nextafter(local[0, 3], np.float32(9))
            tensor = torch.from_numpy(local if len(held[0].shape) == 2 else local[0])
            if kind == "weight":
                found += parameter_contributions(tensor, held, kind)
            else:
                start, stop = (tensor.numel() * index // dp_size for index in (dp_rank, dp_rank + 1))
                found += shard_contributions(tensor.reshape(-1)[start:stop], start, tensor.shape, held, kind)
    try:
        tensors = collect(found, expected=published_shapes(MODEL), kinds=KINDS)
    except Differs as error:
        return {"differs": str(error)}
    finally:
        torch.distributed.destroy_process_group()
    return {f"{name} {kind}": tensor.to_list() for (name, kind), tensor in tensors.items()}
