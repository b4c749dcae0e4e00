"""Every packaged recipe becomes NeMo's and Megatron's configuration; the twins run on what their parents leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.recipe.compose import compose
from apertus_nemo.testing.ranks import Parent
from tests.integration.command import ROOT, apertus, shell
from tests.unit.recipe.given import GIVEN
from tests.unit.recipe.test_published import RECIPES


def test_every_recipe_becomes_the_real_configuration(parent: Parent) -> None:
    """But for Transformer Engine's layers, which want a GPU: their place is taken by Megatron's own."""
    given = {recipe: [*GIVEN.get(recipe, []), "model.layer_spec=local"] for recipe in RECIPES}
    (found,) = parent.run("tests.cases.recipes:built", arguments={"recipes": given})
    assert sorted(found) == RECIPES
    for recipe, overrides in given.items():
        run = compose(recipe, overrides).config
        seen: dict[str, Any] = found[recipe]
        assert (seen["layers"], seen["hidden"]) == (run.model.num_layers, run.model.hidden_size)
        assert seen["bf16"] == [run.trainer.precision == "bf16"] * 3
        assert seen["rates"] == [run.optim.lr, run.optim.min_lr]
        p = run.parallel
        ways = [p.tensor_model_parallel_size, p.pipeline_model_parallel_size]
        assert seen["ways"] == [*ways, p.virtual_pipeline_model_parallel_size, p.context_parallel_size], recipe
        assert seen["model_ways"] == seen["ways"]
        assert seen["backend"] == {"cpu": "gloo", "gpu": "nccl"}[run.trainer.accelerator]
        assert seen["deterministic"] == (run.trainer.accelerator == "gpu")


@pytest.mark.full
@pytest.mark.timeout(500)
def test_the_small_twins_of_child_runs(cache: Path, corpus: Path, tmp_path: Path) -> None:
    """From cold, as typed: a run, a longer context from it, its export, and pre-training continued from that."""
    environment = shell(cache, tmp_path / "home")

    def typed(*arguments: str) -> str:
        done = apertus(list(arguments), folder=tmp_path, environment=environment, timeout_s=200.0)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
        return done.stdout

    typed("train", "--run-dir", "first", "trainer.max_steps=3")
    typed("train", "recipe=tiny_long_context", "initial.path=first", "--run-dir", "long", "trainer.max_steps=2")
    typed("convert", "export", "first", "folder")
    text = str(ROOT / "docs" / "data.md")
    typed("data", "build", "--input", text, "--tokenizer", str(corpus / "tokenizer"), "--output", "mine")
    typed(
        *("train", "recipe=tiny_continued", "initial.path=folder", "data.path=mine", "trainer.max_steps=2"),
        *("--run-dir", "continued"),
    )
    last = json.loads((tmp_path / "first" / "states" / "step-000000003.json").read_bytes())
    weights = {name: lanes for name, kind, _, _, lanes in last["tensors"] if kind == "weight"}
    for child in ("long", "continued"):
        state = json.loads((tmp_path / child / "states" / "step-000000000.json").read_bytes())
        assert {name: lanes for name, kind, _, _, lanes in state["tensors"] if kind == "weight"} == weights
