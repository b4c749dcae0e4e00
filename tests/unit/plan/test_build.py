"""Megatron's own modules, as shapes, against what the plan counts: equal to the parameter and to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from apertus_nemo.testing.ranks import Parent
from tests.unit.plan.recipes import write
from tests.unit.recipe.given import GIVEN

SINGLE = ["parallel.virtual_pipeline_model_parallel_size=null"]


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        pytest.param(["recipe=published_70b"], [0, 511, 512, 4095], id="70b"),
        pytest.param(["recipe=published_70b", *SINGLE, "parallel.sequence_parallel=false"], [0, 2048], id="70b plain"),
        pytest.param(["recipe=published_8b"], [0, 511], id="8b"),
        pytest.param(["recipe=published_8b", "parallel.tensor_model_parallel_size=8"], [511], id="8b tp8"),
        pytest.param(["trainer.micro_batch_size=4"], [0], id="tiny"),
        pytest.param(["parallel=tp2_sp"], [0, 1], id="tiny tp2_sp"),
        pytest.param(["parallel=pp2"], [0, 1], id="tiny pp2"),
    ],
)
def test_equal(parent: Parent, tmp_path: Path, overrides: list[str], ranks: list[int]) -> None:
    arguments = {"recipes": str(write(tmp_path / "here")), "overrides": overrides, "ranks": ranks}
    (rows,) = parent.run("tests.cases.plan:built", arguments=arguments, timeout_s=120.0)
    for row in rows:
        assert row["parameters"] == row["planned_parameters"] == sum(row["chunks"])
        assert row["layer_bytes"] == row["planned_layer_bytes"]
        assert row["agrees"]


@pytest.mark.parametrize(("recipe", "parameters"), [("8b", 8_053_338_176), ("70b", 70_599_864_480)])
def test_the_whole_model_in_one_piece(parent: Parent, tmp_path: Path, recipe: str, parameters: int) -> None:
    """As shapes, on one rank: Megatron's own modules have the published number of parameters."""
    uncut = [f"parallel.{ways}_model_parallel_size=1" for ways in ("tensor", "pipeline")]
    alone = ["parallel.sequence_parallel=false", "trainer.num_nodes=1", "trainer.devices=1"]
    overrides = [f"recipe=published_{recipe}", *SINGLE, *uncut, *alone]
    arguments = {"recipes": str(write(tmp_path / "here")), "overrides": overrides, "ranks": [0]}
    ((row,),) = parent.run("tests.cases.plan:built", arguments=arguments, timeout_s=120.0)
    assert row["parameters"] == row["planned_parameters"] == parameters


def test_the_first_rank_of_70b(parent: Parent) -> None:
    """TP4 PP8 of the packaged recipe: 2,407,696,896 in matrices and norms; 10 layers of two scalars of xIELU."""
    overrides = ["recipe=apertus_70b_pretrain", *GIVEN["apertus_70b_pretrain"]]
    arguments = {"recipes": None, "overrides": overrides, "ranks": [0]}
    ((row,),) = parent.run("tests.cases.plan:built", arguments=arguments, timeout_s=120.0)
    assert row["agrees"]
    assert row["parameters"] - 2 * 10 == 2_407_696_896
