"""The packaged recipes: short, whole, able to run; the long-context runs with the numbers that were published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.check import find
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.stages import StagePlan
from tests.unit.recipe.given import GIVEN

LEFT_OUT = (
    "initial.path=null, initial.kind={kind}: weights that are read lie in a folder; name it, or set initial.kind=none"
)
FOLDER = Path(__file__).parents[3] / "recipes" / "recipe"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# arXiv 2509.14233, tables 5 and 8, and the scripts of swiss-ai/pretrain-code:
# theta in millions, (batch, steps) of 8B and of 70B, billions of tokens, ways of model parallelism of 8B, CP of 70B
LONG: dict[str, tuple[int, tuple[int, int], tuple[int, int], float, int, int]] = {
    "8k": (1, (1024, 9350), (2048, 4680), 78.55, 2, 1),
    "16k": (2, (512, 6930), (1024, 3470), 58.29, 4, 2),
    "32k": (4, (256, 7000), (512, 3500), 58.88, 8, 4),
    "64k": (12, (128, 3480), (256, 1742), 29.28, 16, 8),
}


def resolved(recipe: str) -> Any:
    """With what is the user's to give."""
    return compose(recipe, GIVEN.get(recipe, [])).config


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_short_and_could_run(recipe: str) -> None:
    text = (FOLDER / f"{recipe}.yaml").read_text()
    assert len(text.splitlines()) <= 120
    assert text.startswith("# @package _global_\n# ")
    assert f"\nname: {recipe}\n" in text
    config = resolved(recipe)
    assert find(config) == []
    assert config.name == recipe


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "initial.path" in str(GIVEN.get(recipe))])
def test_where_a_child_run_starts_must_be_given(recipe: str) -> None:
    config = compose(recipe, [text for text in GIVEN[recipe] if not text.startswith("initial.path")]).config
    kind = config.initial.kind
    assert [finding.line(config) for finding in find(config)] == [LEFT_OUT.format(kind=kind)]


@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("size", ["8b", "70b"])
def test_long_context_as_published(size: str, length: str) -> None:
    theta, *runs, billions, ways, context = LONG[length]
    batch, steps = runs[size == "70b"]
    config = resolved(f"apertus_{size}_long_{length}")
    positions = int(length[:-1]) * 1024
    assert (config.data.seq_length, config.model.max_position_embeddings) == (positions, positions)
    assert config.model.rotary_base == theta * 1e6
    plan, stages = BatchPlan.from_config(config), StagePlan.from_config(config)
    assert plan.sizes == (batch,)
    assert (config.trainer.max_steps or plan.num_steps) == steps
    tokens = stages.consumed_tokens(steps * batch) / 1e9
    assert tokens == pytest.approx(billions, rel=0.004)  # the report counts the data, not what the steps consume
    rate = {"8b": 1.1e-5, "70b": 1e-6}[size]
    assert (config.optim.lr, config.optim.min_lr, config.schedule.decay_samples) == (rate, rate, 0)
    warmup = config.schedule.warmup_samples
    assert warmup == {"8b": 150, "70b": 75}[size] * batch
    assert warmup * positions == 1_258_291_200  # 1.26B tokens
    assert (config.optim.alpha_warmup_steps, config.optim.beta3_warmup_steps) == (100_000, 100_000)
    assert config.model_parallel_size == (ways if size == "8b" else 32 * context)
    if size == "70b":
        assert config.data_parallel_size == {8: 4}.get(context, 64 // context)  # at 64k the report says 8
    assert (config.parallel.sequence_parallel, config.trainer.micro_batch_size) == (True, 1)
    assert config.data.goldfish
    assert config.data.eod_mask_loss == (length != "64k")


def test_every_size_of_a_family_differs_in_nothing_else() -> None:
    """The tiny twins take their model, optimizer and stages from the same groups."""
    for twin, parent in (("tiny_long_context", "tiny_pretrain"), ("tiny_continued", "tiny_pretrain")):
        one, other = resolved(twin), resolved(parent)
        model = replace(one.model, max_position_embeddings=0, rotary_base=0.0)
        assert model == replace(other.model, max_position_embeddings=0, rotary_base=0.0)
        assert one.trainer.accelerator == "cpu"
