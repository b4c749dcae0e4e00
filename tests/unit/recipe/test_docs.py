"""docs/recipes.md and docs/show.md say what is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.recipe import source
from apertus_nemo.recipe.compose import available, compose
from apertus_nemo.recipe.locate import packaged_recipes
from apertus_nemo.recipe.resolvers import HARMLESS

DOCS = Path(__file__).resolve().parents[3] / "docs"
RECIPES = (DOCS / "recipes.md").read_text()


def test_groups_and_files_are_listed() -> None:
    tree = RECIPES.split("    recipes/\n")[1].split("\n\n")[0]
    groups = dict(re.findall(r"^      (\w+)/ +(.*)$", tree, re.MULTILINE))
    assert sorted(groups) == sorted(p.name for p in packaged_recipes().iterdir())
    assert set(groups) - {"preset"} == set(source.GROUPS)  # which is for any recipe, and no section of one
    for group in ("preset", "model", "data", "schedule", "parallel", "trainer", "reproducibility", "cluster", "image"):
        assert [name for name in available(group) if name not in re.findall(r"\w+", groups[group])] == [], group


def test_overrides_of_the_table_compose() -> None:
    overrides = re.findall(r"^\| `([^`]+)` \| (?:chooses a|sets|refers|removes)", RECIPES, re.MULTILINE)
    examples = [o.replace("'", "") for o in overrides if o not in ("recipe=R", "++key=value")]
    assert len(examples) >= 6
    for example in examples:
        compose(overrides=[example])


def test_own_recipe_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(RECIPES.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "model" / "wide.yaml").write_text("hidden_size: 256\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "here.yaml").write_text("# @package _global_\ntrainer: {seed: 7}\n")
    config = compose("mine", ["+site=here"], recipe_dirs=[tmp_path]).config
    assert (config.name, config.optim.lr, config.trainer.devices, config.trainer.seed) == ("mine", 1e-3, 2, 7)
    wide = compose(overrides=["model=[tiny,wide]"], recipe_dirs=[tmp_path]).config
    assert (wide.model.hidden_size, wide.model.num_layers) == (256, 4)
    assert main(["show", "--recipes", str(tmp_path), "recipe=mine"]) == 0


def test_python_of_the_page_runs() -> None:
    exec(compile(RECIPES.split("```python\n")[1].split("```")[0], "recipes.md", "exec"), {})


def test_resolvers_are_listed() -> None:
    assert all(f"`{name}`" in RECIPES for name in HARMLESS)


def test_output_of_show(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "show.md").read_text()
    block = page.split("    $ apertus-nemo show parallel=tp2 optim.lr=2e-3\n")[1].split("\n\n")[0]
    assert main(["show", "parallel=tp2", "optim.lr=2e-3"]) == 0
    output = capsys.readouterr().out
    for piece in block.split("    ...\n"):
        assert "\n".join(line[4:] for line in piece.splitlines()) in output
