"""xIELU, RMSNorm and core attention, each against an independent computation."""

from __future__ import annotations

import pytest

from apertus_nemo.testing.ranks import Parent

# Published formula at exact initial values, computed for the reference: f(-10), f(-2), ... f(2).
XIELU = [2.2, -0.0917318, -0.2056964, -0.1647755, -0.0461301, -8e-7, 0.45, 1.3, 4.2]


def test_xielu_in_float32(parent: Parent) -> None:
    (got,) = parent.run("tests.cases.model:xielu", arguments={"dtype": "float32"})
    assert got["values"][1:] == pytest.approx(XIELU[1:], rel=2e-7, abs=1e-7)
    assert got["values"][0] == pytest.approx(XIELU[0], abs=0.01)
    assert got["value"] < 6e-7
    assert got["grad_x"] < 4e-7
    for scalar in ("alpha_p", "alpha_n"):
        ours, reference = got[scalar]
        assert abs(ours - reference) < 1e-7 * got["scale_p"]
    assert got["again"]


def test_xielu_in_bfloat16_rounds_once(parent: Parent) -> None:
    (got,) = parent.run("tests.cases.model:xielu", arguments={"dtype": "bfloat16"})
    assert got["types"] == ["torch.bfloat16"] * 3
    assert got["value"] < 2**-8  # half a unit in the last place, against float64 of the same bf16 inputs
    assert got["grad_x"] < 2**-8


def test_rms_norm(parent: Parent) -> None:
    (got,) = parent.run("tests.cases.model:norm")
    assert got["equal"]  # bit for bit transformers' forward in float32
    assert max(got["gradients"]) < 2e-6
    assert got["again"]
    assert got["bf16"] < 2**-7
    assert got["marks"] == [True, False]


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "per document"])
@pytest.mark.parametrize("length", [96, 700])
def test_core_attention(parent: Parent, length: int, masked: bool) -> None:
    (got,) = parent.run("tests.cases.model:attention", arguments={"length": length, "masked": masked})
    assert got["value"] < 1e-6
    assert got["gradient"] < 1e-6
    assert got["largest"] <= min(length, 512) * got["row"]  # scores of at most 512 queries at a time


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "per document"])
@pytest.mark.parametrize(
    ("ranks", "length"), [(2, 96), *(pytest.param(*more, marks=pytest.mark.full) for more in ((2, 1400), (4, 96)))]
)
def test_core_attention_under_context_parallelism(parent: Parent, ranks: int, length: int, masked: bool) -> None:
    arguments = {"length": length, "masked": masked}
    for got in parent.run("tests.cases.model:attention", world_size=ranks, arguments=arguments):
        assert got["value"] < 1e-6
        assert got["gradient"] < 1e-6
        assert got["largest"] <= min(length // 2, 512) * got["row"]


def test_packed_attention_is_handed_documents_one_after_another(parent: Parent) -> None:
    """The packing alone: Transformer Engine's own kernel is compared in test_config.py, on a GPU."""
    (got,) = parent.run("tests.cases.model:attention", arguments={"length": 96, "masked": True, "via": "packed"})
    assert got["value"] < 1e-6
    assert got["gradient"] < 1e-6


def test_borders_of_documents(parent: Parent) -> None:
    numbers = [[0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [5, 5, 5, 5, 5, 6]]
    (got,) = parent.run("tests.cases.model:borders", arguments={"numbers": numbers})
    assert got == [0, 2, 3, 6, 12, 13, 14, 15, 16, 17, 18, 23, 24]


def test_a_mask_that_is_no_borders_is_our_own_fault(parent: Parent) -> None:
    (got,) = parent.run("tests.cases.model:foreign_mask")
    assert got == "; ".join(["these are no borders of documents in 2 samples of 6 tokens"] * 2)
