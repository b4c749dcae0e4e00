"""bfloat16 with float32 master weights on a CPU: repeatable, cut in two, and close to float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apertus_nemo.record.state import KINDS, StateDigest
from tests.integration.runs import Run

BF16 = ("trainer.precision=bf16", "trainer.max_steps=8", "trainer.checkpoint_every_steps=4")
LAST = 8
EPSILON = 2.0**-8  # of bfloat16: half a unit in the last place, relative


def tensors(run: Run, step: int) -> dict[tuple[str, str], Any]:
    state = StateDigest.from_bytes(run.directory.state(step).read_bytes(), what="state")
    return {(tensor.name, tensor.kind): tensor for tensor in state.tensors}


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2", marks=pytest.mark.full)])
def test_two_runs_are_identical(runs: Callable[..., Run], layout: str) -> None:
    first, second = runs(layout, *BF16), runs(layout, *BF16, again=1)
    assert first.steps == second.steps
    assert first.directory.state(LAST).read_bytes() == second.directory.state(LAST).read_bytes()


def test_weights_are_narrow_and_master_weights_are_in_the_record(runs: Callable[..., Run]) -> None:
    start, end = tensors(runs("one", *BF16), 0), tensors(runs("one", *BF16), LAST)
    names = {name for name, _ in start}
    assert start.keys() == end.keys() == {(name, kind) for name in names for kind in KINDS}
    assert {kind: {start[name, kind].dtype for name in names} for kind in KINDS} == {
        kind: {"bfloat16" if kind == "weight" else "float32"} for kind in KINDS
    }
    assert all(start[name, "master"].lanes != end[name, "master"].lanes for name in names)


@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2", marks=pytest.mark.full)])
def test_a_cut_model_starts_from_the_same_bits(runs: Callable[..., Run], layout: str) -> None:
    cut, one = runs(layout, *BF16), runs("one", *BF16)
    assert cut.directory.state(0).read_bytes() == one.directory.state(0).read_bytes()
    assert cut.steps[1].batch_digest == one.steps[1].batch_digest
    assert cut.steps[1].loss == pytest.approx(one.steps[1].loss, rel=EPSILON)
    assert cut.steps[1].grad_norm == pytest.approx(one.steps[1].grad_norm, rel=4 * EPSILON)


def test_it_computes_what_float32_computes(runs: Callable[..., Run]) -> None:
    narrow, wide = runs("one", *BF16).steps, runs("one").steps
    assert narrow[1].batch_digest == wide[1].batch_digest
    for step in (1, 2, LAST):
        assert narrow[step].loss == pytest.approx(wide[step].loss, rel=EPSILON)
        assert narrow[step].loss != wide[step].loss
    assert narrow[1].grad_norm == pytest.approx(wide[1].grad_norm, rel=4 * EPSILON)


@pytest.mark.parametrize(("source", "target"), [("one", "tp2"), pytest.param("tp2", "dp2", marks=pytest.mark.full)])
def test_a_checkpoint_brings_weights_and_masters_back(runs: Callable[..., Run], source: str, target: str) -> None:
    whole = runs(source, *BF16)
    loaded = runs(target, *BF16, "trainer.max_steps=5", checkpoint=whole.directory.checkpoint(4), fill=0.5)
    expected = {f"{name} {kind}": tensor.to_list()[2:] for (name, kind), tensor in tensors(whole, 4).items()}
    for rank in loaded.ranks:
        assert rank["start"] == expected
        assert all(rank["filled"][name] != value for name, value in expected.items())
