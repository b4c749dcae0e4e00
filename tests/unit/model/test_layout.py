"""The map between Megatron's parameters and published tensors: counts, exact covers, the order of QKV rows."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from apertus_nemo.errors import ApertusError
from apertus_nemo.model.layout import layer_parameter_count, parameter_count, partition_dim, pieces, published_shapes
from apertus_nemo.recipe.schema import ModelConfig

SMALL = ModelConfig(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=12,
    num_query_groups=4,
    head_dim=6,
    vocab_size=32,
)
LAYER = {  # Megatron's name within a layer -> shape of the whole, of which tensor parallelism cuts one dimension
    "self_attention.linear_qkv.weight": ((12 + 2 * 4) * 6, 24),
    "self_attention.q_layernorm.weight": (6,),
    "self_attention.k_layernorm.weight": (6,),
    "self_attention.linear_proj.weight": (24, 72),
    "mlp.linear_fc1.weight": (40, 24),
    "mlp.activation_func.alpha_p": (1,),
    "mlp.activation_func.alpha_n": (1,),
    "mlp.linear_fc2.weight": (24, 40),
}
LOCAL = {"input_layernorm.weight": (24,), "pre_mlp_layernorm.weight": (24,)}
FUSED = {"self_attention.linear_qkv.layer_norm_weight": (24,), "mlp.linear_fc1.layer_norm_weight": (24,)}


def _parameters(norms: dict[str, tuple[int, ...]], layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (32, 24),
        "decoder.final_layernorm.weight": (24,),
        "output_layer.weight": (32, 24),
    }
    for index in range(layers):
        found.update({f"decoder.layers.{index}.{name}": shape for name, shape in {**LAYER, **norms}.items()})
    return found


@pytest.mark.parametrize(
    ("sizes", "total", "layer"),
    [
        ((32, 4096, 21504, 32), 8_053_338_176, 218_112_258),
        ((80, 8192, 43008, 64), 70_599_864_480, 855_654_658),
    ],
)
def test_published_parameter_counts(sizes: tuple[int, ...], total: int, layer: int) -> None:
    model = ModelConfig(
        num_layers=sizes[0],
        hidden_size=sizes[1],
        ffn_hidden_size=sizes[2],
        num_attention_heads=sizes[3],
        num_query_groups=8,
        head_dim=128,
        vocab_size=131072,
    )
    assert parameter_count(model) == total
    assert layer_parameter_count(model) == layer
    assert sum(int(np.prod(shape)) for shape in published_shapes(model).values()) == total


@pytest.mark.parametrize("norms", [LOCAL, FUSED], ids=["local", "transformer_engine"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2])
def test_pieces_cover_both_sides_exactly_once(norms: dict[str, tuple[int, ...]], tp_size: int, stages: int) -> None:
    published = {name: np.zeros(s if len(s) == 2 else (1, *s), int) for name, s in published_shapes(SMALL).items()}
    replicated = set()
    for stage in range(stages):
        for tp_rank in range(tp_size):
            for name, whole in _parameters(norms, SMALL.num_layers // stages).items():
                if stage and ("layers" not in name):
                    continue
                shape = list(whole)
                dim = partition_dim(name)
                if dim >= 0:
                    shape[dim] //= tp_size
                local = np.zeros(shape if len(shape) == 2 else (1, *shape), int)
                for piece in pieces(
                    name, SMALL, tp_rank=tp_rank, tp_size=tp_size, layer_offset=stage * (SMALL.num_layers // stages)
                ):
                    assert piece.shape == published_shapes(SMALL)[piece.name]
                    local[slice(*piece.local_rows), slice(*piece.local_cols)] += 1
                    published[piece.name][slice(*piece.rows), slice(*piece.cols)] += 1
                    if dim < 0:
                        replicated.add(piece.name)
                assert (local == 1).all(), name
    for name, held in published.items():
        assert (held == (tp_size if name in replicated else 1)).all(), name
    assert {name for name, shape in published_shapes(SMALL).items() if len(shape) == 1} == replicated


@pytest.mark.parametrize("tp_size", [1, 2])
def test_qkv_rows_are_grouped_by_key_value_head(tp_size: int) -> None:
    groups, queries, width, hidden = 4, 3, 6, 24
    q = np.arange(groups * queries * width * hidden).reshape(groups * queries * width, hidden)
    k = 10_000 + np.arange(groups * width * hidden).reshape(groups * width, hidden)
    v = 20_000 + np.arange(groups * width * hidden).reshape(groups * width, hidden)
    expected = np.concatenate(  # the published converter's rule, by reshaping
        [
            q.reshape(groups, queries * width, hidden),
            k.reshape(groups, width, hidden),
            v.reshape(groups, width, hidden),
        ],
        axis=1,
    ).reshape(-1, hidden)
    ranks = []
    for tp_rank in range(tp_size):
        local = np.full((120 // tp_size, hidden), -1)
        for piece in pieces(
            "decoder.layers.1.self_attention.linear_qkv.weight", SMALL, tp_rank=tp_rank, tp_size=tp_size, layer_offset=2
        ):
            assert piece.name.startswith("model.layers.3.self_attn.")
            source = {"q": q, "k": k, "v": v}[piece.name.split(".")[4][0]]
            local[slice(*piece.local_rows)] = source[slice(*piece.rows)]
        ranks.append(local)
    np.testing.assert_array_equal(np.concatenate(ranks), expected)


@pytest.mark.parametrize(
    "name",
    [
        "module.decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc1.bias",
        "decoder.layers.01.mlp.linear_fc1.weight",
        "decoder.layers.0.self_attention.linear_qkv._extra_state",
        "decoder.layers.4.mlp.linear_fc1.weight",
        "embedding.position_embeddings.weight",
    ],
)
def test_unknown_parameters_are_our_own_fault(name: str) -> None:
    with pytest.raises(ApertusError) as caught:
        pieces(name, SMALL, tp_rank=0, tp_size=1)
    assert caught.value.exit_code == 4
    assert name in str(caught.value)


def test_an_uneven_cut_is_refused() -> None:
    with pytest.raises(ApertusError, match="num_query_groups: 4 is not divisible by tensor_model_parallel_size 3"):
        pieces("decoder.layers.0.self_attention.linear_qkv.weight", SMALL, tp_rank=0, tp_size=3)


def test_the_layout_needs_neither_torch_nor_numpy() -> None:
    code = "import sys; import apertus_nemo.model.layout; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
