"""Models from recipes: published sizes, bf16, what is refused, and the two layer specifications."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from apertus_nemo.testing.ranks import Parent

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ({"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 21504, "num_attention_heads": 32}, 8_053_338_176),
        ({"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 43008, "num_attention_heads": 64}, 70_599_864_480),
    ],
    ids=["8b", "70b"],
)
def test_published_sizes(parent: Parent, model: dict[str, Any], parameters: int) -> None:
    sizes = {**model, "num_query_groups": 8, "head_dim": 128, "vocab_size": 131072}
    assert parent.run("tests.cases.model:meta", arguments=sizes) == [{"parameters": parameters, "held": parameters}]


def test_bf16(parent: Parent) -> None:
    (got,) = parent.run("tests.cases.model:bf16")
    assert got["types"] == ["torch.bfloat16"]
    assert got["rounded"]
    assert got["alphas"] == [0.2109375, -1.046875]
    assert got["losses"][1] == pytest.approx(got["losses"][0], rel=5e-3)
    assert got["gradients"]


def test_what_cannot_be_built_is_said(parent: Parent) -> None:
    (got,) = parent.run("tests.cases.model:refusals")
    expected = {
        "unstarted": ["ApertusError", 4, "build_model: Megatron's parallel state is not initialised"],
        "unknown": ["InputError", 2, "model.layer_spec is 'flash': must be one of local, transformer_engine"],
        "batch_p2p_comm": [
            "ApertusError",
            4,
            (
                "batch_p2p_comm=True with virtual pipeline stages: gloo mixes up messages where both neighbours of a "
                "stage are one rank: wrong losses, without an error"
            ),
        ],
        "deallocate_pipeline_outputs": [
            "ApertusError",
            4,
            (
                "deallocate_pipeline_outputs=True with virtual pipeline stages: gloo still sends from outputs that "
                "Megatron frees: wrong losses, without an error"
            ),
        ],
    }
    if not HAVE_TE:
        expected["transformer_engine"] = [
            "UnfitEnvironment",
            3,
            (
                "model.layer_spec is 'transformer_engine', which cannot be imported (No module named "
                "'transformer_engine'): install Transformer Engine >= 1.9, or choose model.layer_spec=local"
            ),
        ]
    assert got == expected


@pytest.mark.gpu
@pytest.mark.skipif(not HAVE_TE, reason="Transformer Engine is not installed")
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "per document"])
def test_transformer_engine_is_the_same_model(parent: Parent, masked: bool) -> None:
    (got,) = parent.run("tests.cases.model:transformer_engine", arguments={"masked": masked}, timeout_s=280.0)
    assert got["names"][0] == got["names"][1]
    assert got["losses"][0] == pytest.approx(got["losses"][1], rel=5e-3)
    for name, cosine in got["cosines"].items():
        assert cosine > 0.99, name
