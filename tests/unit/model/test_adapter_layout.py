"""Adapters' matrices: covered by the pieces of all ranks, counted by hand, drawn alike at every cut."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from apertus_nemo.errors import ApertusError
from apertus_nemo.model.adapter_layout import (
    adapter_parameter_count,
    adapter_partition_dim,
    adapter_pieces,
    adapter_shapes,
    base_name,
)
from apertus_nemo.model.init import initial_values
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.schema import AdapterConfig, ModelConfig

LORA = AdapterConfig(kind="lora")
MODEL = compose("tiny_lora").config.model
PLACES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
PARAMETERS = [f"decoder.layers.{{}}.{place}.adapter.linear_{side}.weight" for place in PLACES for side in ("in", "out")]


def model_of(recipe: str) -> ModelConfig:
    return compose(recipe, ["data.path=/data", "initial.path=/weights"]).config.model


def test_names_and_shapes() -> None:
    shapes = {name: shape for name, shape in adapter_shapes(MODEL, LORA).items() if ".layers.3." in name}
    assert shapes == {
        f"model.layers.3.{name}.weight": shape
        for name, shape in {
            "self_attn.qkv_proj.lora_A": (8, 128),
            "self_attn.q_proj.lora_B": (128, 8),
            "self_attn.k_proj.lora_B": (64, 8),
            "self_attn.v_proj.lora_B": (64, 8),
            "self_attn.o_proj.lora_A": (8, 128),
            "self_attn.o_proj.lora_B": (128, 8),
            "mlp.up_proj.lora_A": (8, 128),
            "mlp.up_proj.lora_B": (672, 8),
            "mlp.down_proj.lora_A": (8, 672),
            "mlp.down_proj.lora_B": (128, 8),
        }.items()
    }
    assert adapter_shapes(MODEL, AdapterConfig()) == {}
    some = adapter_shapes(MODEL, replace(LORA, rank=2, targets=("linear_fc1",)))
    assert set(some.values()) == {(2, 128), (672, 2)}


def test_counted_by_hand() -> None:
    """8B: a layer has 8 x (4096 + 6144, 4096 + 4096, twice 4096 + 21504); 70B: 8 x (8192 + 10240, ...)."""
    layer_8b = 8 * (4096 + 6144 + 4096 + 4096 + 2 * (4096 + 21504))
    layer_70b = 8 * (8192 + 10240 + 8192 + 8192 + 2 * (8192 + 43008))
    assert adapter_parameter_count(model_of("apertus_8b_lora"), LORA) == 32 * layer_8b == 17_825_792
    assert adapter_parameter_count(model_of("apertus_70b_lora"), LORA) == 80 * layer_70b == 87_818_240


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_cover_each_matrix_once_and_draw_what_one_draws(tp_size: int) -> None:
    shapes = adapter_shapes(MODEL, LORA)
    covered: dict[str, Any] = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for layer in range(MODEL.num_layers):
        for tp_rank in range(tp_size):
            for parameter in PARAMETERS:
                offset = {"tp_rank": tp_rank, "tp_size": tp_size, "layer_offset": layer}
                blocks = adapter_pieces(parameter.format(0), MODEL, 8, **offset)
                local = 0
                for piece in blocks:
                    assert piece.shape == shapes[piece.name]
                    covered[piece.name][slice(*piece.rows), slice(*piece.cols)] += 1
                    whole = values(piece.name, shapes)
                    mine = values(piece.name, shapes, piece.rows, piece.cols)
                    assert np.array_equal(mine, whole[slice(*piece.rows), slice(*piece.cols)])
                    local += mine.size
                cut = adapter_partition_dim(parameter.format(0))
                assert max(b.local_cols[1] for b in blocks) in (8, 128, 672 // (tp_size if cut else 1), 128 // tp_size)
    assert all((count == 1).all() for count in covered.values())


def values(name: str, shapes: dict[str, Any], rows: Any = None, cols: Any = None) -> Any:
    shape = shapes[name]
    return initial_values(name, shape, rows or (0, shape[0]), cols or (0, shape[1]), seed=28, model=MODEL)


def test_initial_values() -> None:
    """A as PEFT draws it: uniform within 1 / sqrt(in), so with a variance of a third of that squared. B: zero."""
    shapes = adapter_shapes(MODEL, LORA)
    drawn = values("model.layers.0.mlp.down_proj.lora_A.weight", shapes)
    bound = 1 / math.sqrt(672)
    assert float(np.abs(drawn).max()) < bound
    assert np.abs(drawn).max() > 0.99 * bound
    assert abs(drawn.mean()) < 4 * bound / math.sqrt(3 * drawn.size)
    assert float(drawn.var() / (bound * bound / 3)) == pytest.approx(1, abs=0.05)
    assert not values("model.layers.0.mlp.down_proj.lora_B.weight", shapes).any()
    other = values("model.layers.1.mlp.down_proj.lora_A.weight", shapes)
    assert not np.array_equal(drawn, other)


def test_other_names_are_refused() -> None:
    assert base_name("decoder.layers.0.mlp.linear_fc1.to_wrap.weight") == "decoder.layers.0.mlp.linear_fc1.weight"
    for name in ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc3.adapter.linear_in.weight"):
        with pytest.raises(ApertusError, match="is no parameter of an adapter"):
            adapter_pieces(name, MODEL, 8, tp_rank=0, tp_size=1)
    with pytest.raises(ApertusError, match=r"adapter\.rank: 3 is not divisible by tensor_model_parallel_size 2"):
        adapter_pieces(PARAMETERS[0].format(0), MODEL, 3, tp_rank=0, tp_size=2)
