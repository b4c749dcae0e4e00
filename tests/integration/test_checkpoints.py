"""Checkpoints: every tensor comes back bit-equal at any layout, training goes on as if never stopped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.state import KINDS, StateDigest
from apertus_nemo.testing.ranks import Parent, RankFailed
from tests.integration.runs import SAVED_STEP, SINGLE, STEPS, Run

FILL = 0.5  # stands in every weight and state before the load; a value that none of them is full of
ONE_MORE = f"trainer.max_steps={SAVED_STEP + 1}"

# Each direction of each kind of cut once; the rest runs with --full.
SOON = {("one", "tp2_dp2"), ("tp2", "pp2"), ("pp2", "dp2"), ("dp2", "tp2"), ("tp2_dp2", "one")}
SOON |= {("one", "cp2"), ("cp2", "pp2_vpp2"), ("pp2_vpp2", "one")}
EACH_WITH_EACH = ("one", "tp2", "tp2_sp", "pp2", "dp2", "tp2_dp2")
ROUND = ("cp2", "pp2_vpp2", "tp2_cp2", "pp2_cp2", "cp2_dp2", "tp2_pp2", "pp2_dp2", "cp2")  # each saves for the next
PAIRS = [
    pytest.param(source, target, marks=[] if (source, target) in SOON else [pytest.mark.full])
    for source, target in [
        *product(EACH_WITH_EACH, EACH_WITH_EACH),
        *pairwise(ROUND),
        *(("one", "cp2"), ("pp2_vpp2", "one")),
        *(("one_deep", "pp4_vpp2"), ("pp4_vpp2", "one_deep")),
    ]
]


def saved(run: Run) -> dict[str, Any]:
    """The state that the source run digested when it saved: "name kind" -> [dtype, shape, lanes]."""
    state = StateDigest.from_bytes(run.directory.state(SAVED_STEP).read_bytes(), what="saved")
    return {f"{tensor.name} {tensor.kind}": tensor.to_list()[2:] for tensor in state.tensors}


def load(runs: Callable[..., Run], source: str, target: str) -> Run:
    """A fresh process of every rank of `target` loads what `source` saved, and does one more step."""
    return runs(target, ONE_MORE, checkpoint=runs(source).directory.checkpoint(SAVED_STEP), fill=FILL)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_tensor_comes_back(runs: Callable[..., Run], source: str, target: str) -> None:
    expected, loaded = saved(runs(source)), load(runs, source, target)
    kinds = [kind for kind in KINDS if kind != "master"]
    assert {name.split()[1] for name in expected} == set(kinds)
    layers = 8 if source in SINGLE else 4
    assert len(expected) == len(kinds) * (12 * layers + 3)  # and embedding, last norm, output layer
    for rank in loaded.ranks:
        for name, value in expected.items():
            assert rank["filled"][name] != value
            assert rank["start"][name] == value, name
        assert rank["start"].keys() == expected.keys() == rank["filled"].keys()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_next_step_is_the_right_one(runs: Callable[..., Run], source: str, target: str) -> None:
    """At another layout the sums round differently; what the step reads and how fast it learns does not."""
    step = SAVED_STEP + 1
    mine, its = load(runs, source, target).steps, runs(source).steps
    assert list(mine) == [step]
    for value in ("batch_digest", "consumed_samples", "consumed_tokens", "global_batch_size", "learning_rate"):
        assert getattr(mine[step], value) == getattr(its[step], value), value
    assert mine[step].loss == pytest.approx(its[step].loss, rel=1e-6)
    assert mine[step].grad_norm == pytest.approx(its[step].grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        *("one", "tp2"),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("tp2_sp", "pp2", "dp2", "tp2_dp2")),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("cp2", "pp2_vpp2", "tp2_cp2", "pp4_vpp2")),
    ],
)
def test_at_the_same_layout_it_goes_on_as_if_never_stopped(runs: Callable[..., Run], layout: str) -> None:
    whole = runs(layout)
    rest = runs(layout, checkpoint=whole.directory.checkpoint(SAVED_STEP), fill=FILL)
    assert rest.steps == {step: record for step, record in whole.steps.items() if step > SAVED_STEP}
    assert rest.directory.state(STEPS).read_bytes() == whole.directory.state(STEPS).read_bytes()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("drop module.decoder.layers.mlp.linear_fc2.weight", "module.decoder.layers.mlp.linear_fc2.weight"),
        (
            "drop optimizer.state.exp_avg_slow.module.decoder.final_layernorm.weight",
            "exp_avg_slow.module.decoder.final_layernorm",
        ),
        ("add module.decoder.layers.mlp.linear_fc9.weight", "module.decoder.layers.mlp.linear_fc9.weight"),
    ],
)
@pytest.mark.parametrize("layout", ["one", pytest.param("tp2", marks=pytest.mark.full)])
def test_a_tensor_too_few_or_too_many_is_refused(
    runs: Callable[..., Run], parent: Parent, tmp_path: Path, layout: str, how: str, message: str
) -> None:
    whole = str(runs("one").directory.checkpoint(SAVED_STEP))
    tampered = str(tmp_path / "tampered")
    parent.run("tests.cases.training:tamper", arguments={"checkpoint": whole, "copy": tampered, "how": how})
    with pytest.raises(RankFailed) as failed:
        runs(layout, ONE_MORE, checkpoint=Path(tampered))
    assert f"InputError: the checkpoint {tampered} does not fit this run's model and optimizer: " in str(failed.value)
    assert message in str(failed.value)


def test_a_folder_that_was_not_committed_is_no_checkpoint(runs: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=f"InputError: {tmp_path} is not a checkpoint: it holds no manifest.json"):
        runs("one", ONE_MORE, checkpoint=tmp_path)
