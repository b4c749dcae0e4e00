"""`apertus-nemo show`: what it prints is the recipe, and says where each value came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from apertus_nemo.cli.main import main
from apertus_nemo.cli.show import scalar
from apertus_nemo.recipe.compose import compose


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["show", *arguments]) == code
    return capsys.readouterr().out


def test_text_is_yaml_with_origins(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel=tp2", "optim.lr=2e-3", "image.reference='a: #b@sha256:" + "0" * 64 + "'"]
    output = shown(capsys, *overrides)
    resolved = compose(overrides=overrides)
    assert yaml.safe_load(output) == resolved.tree
    assert OmegaConf.to_container(OmegaConf.create(output)) == resolved.tree
    lines = output.splitlines()
    origins = [line.rpartition("  # ")[2] for line in lines if "  # " in line]
    assert origins == list(resolved.provenance.values())
    assert len({line.rindex("  # ") for line in lines if "  # " in line}) == 1  # aligned
    assert "  lr: 0.002 " in output
    assert "# override optim.lr=2e-3" in output


def test_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    """The default recipe: 40 steps of 8 samples, then 20 of 16; 256 tokens a sample."""
    facts = json.loads(shown(capsys, "--json", "parallel=tp2_dp2"))["derived"]
    assert facts == {
        "steps": 60,
        "samples": 640,
        "tokens": 163_840,
        "world_size": 4,
        "data_parallel_size": 2,
        "micro_batches_per_step": [1, 2],
    }
    output = shown(capsys, "trainer.max_steps=41", "parallel=dp2", "trainer.micro_batch_size=1")
    assert output.splitlines()[-7:] == [
        "# what follows",
        "# steps: 41",
        "# samples: 336",
        "# tokens: 86016",
        "# world_size: 2",
        "# data_parallel_size: 2",
        "# micro_batches_per_step: [4, 8]",
    ]


def test_stages_are_yaml_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a corpus in the cache, how often it is read is not known, and said so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = shown(capsys, "recipe=tiny_stages", "data.stages.2.seed=31")
    resolved = compose("tiny_stages", ["data.stages.2.seed=31"])
    assert yaml.safe_load(output) == resolved.tree
    assert max(len(line.split("  # ")[0]) for line in output.splitlines()) < 100
    assert "# recipes/recipe/tiny_stages.yaml, override data.stages.2.seed=31" in output
    unknown = "#   the sources are not built yet, so how often each is read is not known"
    assert output.splitlines()[-6:] == [
        "# stage 1 code: steps 1 to 20, samples 0 to 159 of 128 tokens, seed 28",
        unknown,
        "# stage 2 mixed: steps 21 to 34, samples 160 to 319 of 128 tokens, seed 28, going on in each source",
        unknown,
        "# stage 3 cooldown: steps 35 to 44, samples 320 to 479 of 256 tokens, seed 31",
        unknown,
    ]
    assert "# tokens: 81920" in output
    facts = json.loads(shown(capsys, "--json", "recipe=tiny_stages"))["derived"]
    assert (facts["tokens"], [stage["tokens"] for stage in facts["stages"]]) == (81_920, [20_480, 20_480, 40_960])


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(shown(capsys, "optim.lr=2e-3", "--json", "recipe=tiny_pretrain"))
    resolved = compose(overrides=["optim.lr=2e-3"])
    assert content["config"] == resolved.tree
    assert content["provenance"] == resolved.provenance
    assert content["recipe"] == "tiny_pretrain"
    assert content["overrides"] == ["optim.lr=2e-3", "recipe=tiny_pretrain"]
    assert content["findings"] == []


def test_impossible_recipe_is_shown_and_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "model.head_dim=15"]) == 2
    output = capsys.readouterr()
    assert "head_dim: 15 " in output.out
    assert "# what follows" not in output.out
    assert output.err == (
        "apertus-nemo: model.head_dim=15: rotary embedding turns the elements of a head in pairs; "
        "make it an even number\n"
    )
    content = json.loads(shown(capsys, "--json", "model.head_dim=15", code=2))
    assert content["derived"] == {}
    assert len(content["findings"]) == 1


def test_users_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [tiny_pretrain, _self_]\nname: mine\n"
    )
    assert "# own/recipe/mine.yaml\n" in shown(capsys, "--recipes", "own", "recipe=mine")
    assert main(["show", "recipe=mine"]) == 2
    assert capsys.readouterr().err.startswith("apertus-nemo: recipe=mine does not exist (there are: ")


def test_errors_leave_standard_output_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "model.num_layer=3"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        "apertus-nemo: model.num_layer (override model.num_layer=3) is not a key of a recipe; "
        "did you mean model.num_layers?\n"
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b_c"]), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_scalar_is_yaml(value: Any) -> None:
    """Against PyYAML: what is printed is read back the same."""
    line = f"key: {scalar(value)}  # origin\n"
    assert yaml.safe_load(line) == {"key": value}
    assert line.count("\n") == 1
