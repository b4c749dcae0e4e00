"""The whole model against transformers' ApertusForCausalLM, with the same weights, in float32."""

from __future__ import annotations

from typing import Any

import pytest

from apertus_nemo.model.layout import published_shapes
from apertus_nemo.testing.ranks import Parent
from tests.cases.model import MODEL


@pytest.fixture(scope="module")
def parity(parent: Parent) -> dict[str, Any]:
    (got,) = parent.run("tests.cases.model:parity")
    return dict(got)


def test_names_and_shapes_are_the_published_ones(parity: dict[str, Any]) -> None:
    assert {name: list(shape) for name, shape in published_shapes(MODEL).items()} == parity["shapes"]
    assert sorted(parity["gradients"]) == parity["published"]


def test_logits_and_loss(parity: dict[str, Any]) -> None:
    difference, largest = parity["logits"]
    assert largest > 2.0  # weights that tell
    assert difference < 1e-5
    assert parity["loss"][0] == pytest.approx(parity["loss"][1], rel=1e-6)


def test_gradients_of_all_parameters(parity: dict[str, Any]) -> None:
    gradients = parity["gradients"]
    for name, (difference, largest) in gradients.items():
        assert largest > 0.0, name
        if ".act_fn." in name:  # one number, a sum of both signs: its size says nothing of its terms
            largest = max(size for other, (_, size) in gradients.items() if ".act_fn." in other)
        assert difference < 1e-5, name
        assert difference < 1e-5 * largest, name


def test_documents_of_a_sample_are_as_if_alone(parent: Parent) -> None:
    """RoPE's positions run on across documents here and begin at 0 in the reference: only differences count."""
    (got,) = parent.run("tests.cases.model:parity_by_document")
    assert got["documents"] > 20
    assert got["longest"] == 32
    difference, largest = got["logits"]
    assert largest > 2.0
    assert difference < 1e-5
    scalars = max(size for name, (_, size) in got["gradients"].items() if ".act_fn." in name)
    for name, (difference, largest) in got["gradients"].items():
        assert difference < 1e-5 * (scalars if ".act_fn." in name else largest), name
    assert got["kept"]  # to the bit, whatever the document before it says
    assert got["changed"]
    assert got["seen"] == got["later"] > 100  # which plain causal attention does see
    assert got["undivided"] == 0.0  # one document a sample: the same bits as without borders


@pytest.mark.parametrize(
    "model",
    [
        {"head_dim": 128, "hidden_size": 256, "num_attention_heads": 2},
        {"head_dim": 64, "rotary_base": 12_000_000.0},
        {"rope_scaling_factor": 32.0, "rope_low_freq_factor": 2.0, "rope_original_max_position_embeddings": 4096},
        {"rope_scaling": False},
    ],
    ids=["published", "long context", "other factors", "unscaled"],
)
def test_rotary_frequencies_bit_for_bit(parent: Parent, model: dict[str, Any]) -> None:
    assert parent.run("tests.cases.model:rope", arguments=model) == [True]
