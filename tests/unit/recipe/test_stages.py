"""The plan of stages: which sample is of which stage, and how many tokens that makes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.check import find
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.schema import to_tree
from apertus_nemo.recipe.stages import ONLY, StagePlan, has_corpora, stage_at
from apertus_nemo.recipe.typed import from_tree
from tests.unit.recipe.given import GIVEN
from tests.unit.recipe.test_stage_rules import LIBRARY, a, b, configured
from tests.unit.recipe.test_typed import TINY

THREE = [
    a(mixture=[LIBRARY]),
    b(seq_length=128),
    {"name": "c", "from_sample": 480, "position": "continue", "seed": 5, "seq_length": 128},
]


def test_a_recipe_without_stages_is_one_stage() -> None:
    config = configured([])
    (stage,) = StagePlan.from_config(config).stages
    assert (stage.number, stage.name, stage.from_sample, stage.to_sample) == (1, ONLY, 0, 640)
    assert (stage.seed, stage.seq_length, stage.sources, stage.mixture) == (28, 64, ("",), ())
    assert StagePlan.from_config(config).consumed_tokens(17) == 17 * 64
    assert not has_corpora(config)


def test_stages_take_what_they_do_not_say_from_the_recipe() -> None:
    stages = StagePlan.from_config(configured(THREE)).stages
    assert [(s.number, s.name, s.from_sample, s.to_sample, s.num_samples) for s in stages] == [
        (1, "a", 0, 320, 320),
        (2, "b", 320, 480, 160),
        (3, "c", 480, 640, 160),
    ]
    assert [(s.seed, s.seq_length, s.position, s.sources) for s in stages] == [
        (28, 64, "restart", ("library",)),
        (5, 128, "restart", ("",)),
        (5, 128, "continue", ("",)),
    ]


def test_every_sample_against_a_count_by_hand() -> None:
    config = configured(THREE)
    plan, tokens = StagePlan.from_config(config), 0
    for sample in range(640):
        name = "a" if sample < 320 else "b" if sample < 480 else "c"
        assert stage_at(config, sample).name == name
        assert plan.consumed_tokens(sample) == tokens
        tokens += 64 if name == "a" else 128
    assert plan.consumed_tokens(640) == plan.consumed_tokens(641) == tokens == 320 * 64 + 320 * 128
    assert stage_at(config, 640).name == "c"
    assert plan.max_seq_length == 128


def test_a_tree_may_leave_stages_out_and_keeps_them() -> None:
    """The first records of version 1 have no `data.stages`; what a stage does not say is written out."""
    old = {**TINY, "data": {key: value for key, value in TINY["data"].items() if key != "stages"}}
    assert from_tree(old) == from_tree(TINY)
    tree = to_tree(configured(THREE))
    assert tree["data"]["stages"][0] == {
        "name": "a",
        "from_sample": 0,
        "seed": None,
        "seq_length": None,
        "position": "restart",
        "mixture": [{"source": "library", "weight": None}],
    }
    assert from_tree(tree) == configured(THREE)


def test_a_stage_can_be_changed_by_an_override() -> None:
    overrides = ["data.stages.2.seed=77", "data.stages.0.mixture.1.weight=0.3"]
    config = compose("tiny_stages", overrides).config
    assert (config.data.stages[2].seed, config.data.stages[0].mixture[1].weight) == (77, 0.3)
    config = compose("tiny_stages", ["data.stages.2.mixture=[]", "data.stages.1.mixture=[{source:library}]"]).config
    assert [len(stage.mixture) for stage in config.data.stages] == [2, 1, 0]


def test_asking_for_the_stage_is_light() -> None:
    code = (
        "import sys; from apertus_nemo.recipe.stages import stage_at; from apertus_nemo.recipe.typed import from_tree;"
        "print(sorted({'numpy', 'torch', 'hydra', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


# Final iteration and where the batch doubles; first iteration of each stage (arXiv 2509.14233, table H.8).
PUBLISHED: dict[str, tuple[int, int, dict[str, int]]] = {
    "apertus_8b_pretrain": (
        2_627_139,
        1_678_000,
        {"stage1": 1, "stage3": 1_678_001, "stage4": 2_269_525, "stage5": 2_429_920},
    ),
    "apertus_70b_pretrain": (
        1_155_828,
        523_518,
        {"stage1": 1, "stage2": 569_655, "stage3": 789_001, "stage4": 989_501, "stage5": 1_062_328},
    ),
}
TOKENS_B = {  # of the same table: billions of tokens at the start of a stage
    "apertus_8b_pretrain": (0, 7038, 12_000, 13_345),
    "apertus_70b_pretrain": (0, 5165, 8845, 12_209, 13_431),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_runs_have_the_published_boundaries(recipe: str) -> None:
    final, doubled, first = PUBLISHED[recipe]
    config = published(recipe)
    plan, stages = BatchPlan.from_config(config), StagePlan.from_config(config)
    assert plan.num_steps == final
    size = config.trainer.global_batch_size
    assert [plan.batch_at(step)[1] for step in (1, doubled, doubled + 1, final)] == [size, size, 2 * size, 2 * size]
    assert {s.name: plan.steps_before(s.from_sample) + 1 for s in stages.stages} == first
    assert {s.name: s.from_sample for s in stages.stages} == {n: plan.batch_at(step)[0] for n, step in first.items()}
    billions = [stages.consumed_tokens(stage.from_sample) // 10**9 for stage in stages.stages]
    assert tuple(billions) == TOKENS_B[recipe]
    assert stages.consumed_tokens(config.schedule.train_samples) == 3_662_109_375 * 4096  # 15.000T


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_runs_could_run(recipe: str) -> None:
    assert find(published(recipe)) == []
    assert published(recipe).world_size == {"apertus_8b_pretrain": 512, "apertus_70b_pretrain": 2048}[recipe]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_what_nobody_published_must_be_given(recipe: str) -> None:
    from apertus_nemo.errors import InputError

    later = len(PUBLISHED[recipe][2]) - 1
    with pytest.raises(InputError) as error:
        compose(recipe)
    assert [line.split(";")[0] for line in str(error.value).splitlines()] == [
        f"data.stages.{i}.seed has no value" for i in range(1, later + 1)
    ]
    config = compose(recipe, GIVEN[recipe][1:]).config
    assert next(finding.line(config) for finding in find(config)) == (
        "data.path=null, data.source=built: built data lies in a folder; name the folder that holds a built corpus "
        "for each source of the mixtures"
    )


def published(recipe: str) -> Any:
    """With what is the user's to give."""
    return compose(recipe, GIVEN[recipe]).config
