"""Plans against the published figures of Apertus, and against each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.plan.cost import checkpoint_interval_s
from apertus_nemo.plan.flops import training_flops_per_token
from apertus_nemo.plan.memory import chunks_in_flight, rank_memory
from apertus_nemo.plan.plan import Assumptions, plan, step_at
from apertus_nemo.plan.ranks import place, rank_parameters
from apertus_nemo.plan.text import text
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.compose import available, compose
from apertus_nemo.recipe.schema import RunConfig
from tests.unit.plan.recipes import write
from tests.unit.recipe.given import GIVEN
from tests.unit.recipe.test_published import RECIPES


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("recipes") / "here")


def run_of(recipes: Path, name: str, *overrides: str) -> RunConfig:
    return compose(overrides=[f"recipe={name}", *overrides], recipe_dirs=[recipes]).config


def planned(recipes: Path, name: str, *overrides: str, **assumptions: Any) -> dict[str, Any]:
    return plan(run_of(recipes, name, *overrides), Assumptions(**assumptions))


@pytest.mark.parametrize(
    ("name", "parameters", "steps", "doubled", "decay"),
    [
        ("published_8b", 8_053_338_176, 2_627_139, 1_678_000, 2_429_920),
        ("published_70b", 70_599_864_480, 1_155_828, 523_518, 1_057_219),
    ],
)
def test_published_figures(recipes: Path, name: str, parameters: int, steps: int, doubled: int, decay: int) -> None:
    """arXiv 2509.14233, tables 1, 2 and H.8, and the names of the released checkpoints."""
    tree = planned(recipes, name)
    assert tree["parameters"]["total"] == parameters
    assert tree["steps"] == steps
    assert [row["last_step"] for row in tree["pieces"]] == [doubled, steps]
    assert tree["learning_rate"]["decay_from_step"] == decay
    assert tree["tokens"] == pytest.approx(15e12, rel=1e-5)
    assert not tree["refused"]


@pytest.mark.parametrize(
    ("recipe", "parameters", "steps", "doubled", "flops"),
    [
        ("apertus_8b_pretrain", 8_053_338_176, 2_627_139, 1_678_000, "7.73e+23"),
        ("apertus_70b_pretrain", 70_599_864_480, 1_155_828, 523_518, "6.74e+24"),
    ],
)
def test_the_packaged_recipes(recipe: str, parameters: int, steps: int, doubled: int, flops: str) -> None:
    """The same figures of the recipes as they are, with all stages of their data."""
    tree = plan(compose(recipe, GIVEN[recipe]).config, Assumptions(tokens_per_s_per_gpu=723.0))
    assert tree["parameters"]["total"] == parameters
    assert tree["steps"] == tree["pieces"][-1]["last_step"] == steps
    before, after = (
        [row for row in tree["pieces"] if (row["last_step"] <= doubled) == first] for first in (True, False)
    )
    assert before[-1]["last_step"] == doubled
    assert {2 * row["global_batch_size"] for row in before} == {row["global_batch_size"] for row in after}
    assert f"{tree['flops']['total']:.2e}" == flops
    if recipe == "apertus_70b_pretrain":
        assert f"{tree['cost']['mfu']:.3f}" == "0.328"
        doubled_up = compose(recipe, [*GIVEN[recipe], "trainer.num_nodes=1024"]).config
        replicas = tree["data_parallel_size"], plan(doubled_up, Assumptions())["data_parallel_size"]
        assert replicas == (64, 128)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_its_gpus(recipe: str) -> None:
    """A GH200 has 95.6 GiB; those for a CPU are held against none."""
    run = compose(recipe, GIVEN.get(recipe, [])).config
    tree = plan(run, Assumptions())
    assert tree["refused"] == []
    assert (
        tree["steps"]
        == tree["pieces"][-1]["last_step"]
        == (run.trainer.max_steps or BatchPlan.from_config(run).num_steps)
    )
    assert recipe in text(tree)


def test_stages_count_with_their_own_lengths() -> None:
    """Samples of 128 tokens, then of 256; the batch doubles inside the second stage. FLOPs against a sum by hand."""
    run = compose("tiny_stages").config
    tree = plan(run, Assumptions())
    assert [(row["stage"], row["first_step"], row["last_step"], row["tokens_per_step"]) for row in tree["pieces"]] == [
        ("code", 1, 20, 8 * 128),
        ("mixed", 21, 28, 8 * 128),
        ("mixed", 29, 34, 16 * 128),
        ("cooldown", 35, 44, 16 * 256),
    ]
    assert tree["tokens"] == sum(row["tokens"] for row in tree["pieces"]) == 320 * 128 + 160 * 256
    by_hand = [training_flops_per_token(run.model, length) * length * n for length, n in ((128, 320), (256, 160))]
    assert tree["flops"]["total"] == sum(by_hand)
    assert "stage" in text(tree)
    assert "stage" not in text(plan(compose("tiny_pretrain").config, Assumptions())).split("learning rate")[0]


def test_ranks_of_70b(recipes: Path) -> None:
    """2,407,696,896 and 2,407,705,088 are these ranks' matrices and norms; their 10 layers have two scalars each."""
    run = run_of(recipes, "published_70b")
    assert rank_parameters(run, 0).total - 2 * 10 == 2_407_696_896
    assert rank_parameters(run, 4095).total - 2 * 10 == 2_407_705_088
    assert sum(rank_parameters(run, stage * 512).total for stage in range(8)) > 70_599_864_480 / 4


def test_flops_and_utilisation_of_70b(recipes: Path) -> None:
    """Section 2.6: 6.74e24 FLOPs for 15T tokens, 723 tokens a second and GPU, 6 million GPU hours."""
    tree = planned(recipes, "published_70b", tokens_per_s_per_gpu=723.0)
    assert f"{tree['flops']['total']:.2e}" == "6.74e+24"
    assert f"{tree['cost']['mfu']:.3f}" == "0.328"
    assert tree["cost"]["gpu_hours"] == pytest.approx(6e6, rel=0.05)
    assert tree["cost"]["seconds"] == pytest.approx(tree["cost"]["gpu_hours"] * 3600 / 4096)
    again = planned(recipes, "published_70b", mfu=tree["cost"]["mfu"])
    assert again["cost"]["tokens_per_s_per_gpu"] == pytest.approx(723.0)


@pytest.mark.parametrize(("nodes", "replicas"), [(512, 64), (1024, 128)])
def test_replicas_before_and_after_doubling(recipes: Path, nodes: int, replicas: int) -> None:
    tree = planned(recipes, "published_70b", f"trainer.num_nodes={nodes}")
    assert tree["data_parallel_size"] == replicas
    assert [row["micro_batches"] * replicas for row in tree["pieces"]] == [2048, 4096]


def test_checkpoints(recipes: Path) -> None:
    """18 bytes a parameter; Young's interval of 40 s for saving and 3 h between failures."""
    tree = planned(
        recipes,
        "published_70b",
        tokens_per_s_per_gpu=723.0,
        checkpoint_s=40.0,
        mean_time_between_failures_s=10_800.0,
    )["checkpoint"]
    assert tree["total_bytes"] == 18 * 70_599_864_480
    assert tree["interval_s"] == pytest.approx(math.sqrt(2 * 40 * 10_800))
    assert tree["interval_steps"] == round(tree["interval_s"] / (4096 * 4096 / (723 * 4096)))


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_impossible_times(values: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="takes a positive time"):
        checkpoint_interval_s(*values)


@pytest.mark.parametrize("throughput", [0.0, -1.0, math.nan, math.inf])
def test_impossible_throughput(recipes: Path, throughput: float) -> None:
    with pytest.raises(InputError, match=r"a throughput is a positive number of tokens a second"):
        planned(recipes, "published_8b", tokens_per_s_per_gpu=throughput)


def test_unknown_accelerator(recipes: Path) -> None:
    with pytest.raises(InputError) as error:
        planned(recipes, "published_8b", accelerator="gh100")
    assert str(error.value) == "there is no accelerator 'gh100' in the plan's table; there are gh200, h100"


def test_what_does_not_fit_is_refused(recipes: Path) -> None:
    without = ["parallel.virtual_pipeline_model_parallel_size=null", "parallel.pipeline_model_parallel_size=1"]
    tree = planned(recipes, "published_70b", *without)
    (line,) = tree["refused"]
    assert line.startswith("rank 0 needs ")
    assert "and 90% of a gh200 is 86.0 GiB: cut the model further" in line


def test_recompute_lowers_activations_alone(recipes: Path) -> None:
    kept, again = (
        rank_memory(run_of(recipes, "published_70b"), 0, micro_batches=32, recompute=kind) for kind in ("none", "full")
    )
    assert again.activations < kept.activations / 4
    assert (again.weights, again.gradients, again.optimizer) == (kept.weights, kept.gradients, kept.optimizer)


def test_in_flight(recipes: Path) -> None:
    """Megatron's warm-up: PP-1-stage micro-batches, interleaved 2(PP-1-stage) + (VPP-1) PP chunks, and one more."""
    interleaved = run_of(recipes, "published_70b")
    assert [chunks_in_flight(interleaved, stage, 32) for stage in (0, 7)] == [47, 33]
    plain = run_of(recipes, "published_70b", "parallel.virtual_pipeline_model_parallel_size=null")
    assert [chunks_in_flight(plain, stage, 32) for stage in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert chunks_in_flight(plain, 0, 2) == 2  # no more than there are


def test_places() -> None:
    """Megatron's order: tensor parallel ranks are neighbours, pipeline stages are far apart."""
    run = compose(overrides=["parallel=tp2_dp2"]).config
    assert [(place(run, rank).tp, place(run, rank).dp, place(run, rank).pp) for rank in range(4)] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (1, 1, 0),
    ]
    with pytest.raises(InputError, match="there is no rank 4: the run has ranks 0 to 3"):
        place(run, 4)


def test_steps_at_samples() -> None:
    """A step begins where BatchPlan says."""
    batches = BatchPlan(starts=(0, 20, 44), sizes=(4, 8, 2), train_samples=50)
    for step in range(1, batches.num_steps + 1):
        first, _ = batches.batch_at(step)
        assert step_at(batches, first) == step - 1
    assert step_at(batches, 50) == batches.num_steps


def test_a_cpu_run_is_held_against_no_gpu() -> None:
    tree = plan(compose().config, Assumptions(tokens_per_s_per_gpu=1.0))
    assert (tree["accelerator"], tree["cost"], tree["refused"]) == (None, None, [])
    assert tree["steps"] == 60


WHERE = ["data.path=/data", "initial.path=/weights"]


def test_adapters_of_70b_by_hand() -> None:
    """TP 4 on four GH200: frozen weights in bf16; gradients and states of a quarter of 87,818,240 numbers alone."""
    tree = plan(compose("apertus_70b_lora", WHERE).config, Assumptions())
    layer = 8 * (8192 + 10240 + 8192 + 8192 + 2 * (8192 + 43008))
    assert tree["parameters"]["trained"] == 80 * layer == 87_818_240
    assert tree["parameters"]["total"] == 70_599_864_480
    (row,) = tree["memory"]
    mine = 87_818_240 // 4
    assert row["trained_parameters"] == mine
    assert row["weights_bytes"] == 2 * (17_650_970_784 + mine)
    assert (row["gradients_bytes"], row["optimizer_bytes"]) == (4 * mine, 16 * mine)
    # micro-batches of 4 x 4096 tokens: of 80 layers their input (hidden / 4), of one what it keeps, and its adapters:
    # four of A x, and the inputs of two, gathered
    tokens, tiny = 4 * 4096, (4 * 8 + 2 * 8192) * 2
    without = rank_memory(
        compose("apertus_70b_lora", [*WHERE, "adapter.kind=none"]).config, 0, micro_batches=4, recompute="full"
    )
    assert row["activations_bytes"] == without.activations + tiny * tokens
    assert row["output_bytes"] == tokens * 131072 // 4 * 10
    assert tree["checkpoint"] == {
        "weights_bytes": 2 * 87_818_240,
        "optimizer_bytes": 16 * 87_818_240,
        "total_bytes": 18 * 87_818_240,
    }
    assert tree["refused"] == []
    assert "trained        87,818,240, of adapters; the others are frozen" in text(tree)


def test_flops_of_adapters() -> None:
    """Frozen: twice the forward pass, three times what has no weights (the attention); adapters: six a parameter."""
    run = compose("apertus_8b_lora", WHERE).config
    matrices = 8_053_338_176 - 32 * (2 * 4096 + 2 * 128 + 2) - 4096 - 131072 * 4096  # no norms, scalars, embedding
    attention = 32 * 4 * 4096 * 4096
    assert training_flops_per_token(run.model, 4096) == 3 * (2 * matrices + attention)
    with_adapters = training_flops_per_token(run.model, 4096, run.adapter)
    assert with_adapters == 4 * matrices + 3 * attention + 6 * 17_825_792


@pytest.mark.parametrize(
    ("recipe", "rank", "parameters", "shards"),
    [("apertus_8b_sft", 0, 4_026_806_336, 128), ("apertus_70b_sft", 0, 2_407_696_916, 16)],
)
def test_fine_tuning_on_gh200(recipe: str, rank: int, parameters: int, shards: int) -> None:
    """All weights: bf16, float32 gradients, and 16 bytes of states and float32 weights over the replicas."""
    tree = plan(compose(recipe, WHERE).config, Assumptions(accelerator="gh200"))
    row = tree["memory"][rank]
    assert row["parameters"] == row["trained_parameters"] == parameters
    assert row["weights_bytes"] == 2 * parameters
    assert row["gradients_bytes"] == 4 * parameters
    assert row["optimizer_bytes"] == 16 * -(-parameters // shards)
    assert tree["refused"] == []
    assert tree["parameters"]["trained"] == tree["parameters"]["total"]
    assert max(each["total_bytes"] for each in tree["memory"]) < 0.9 * tree["accelerator"]["memory_bytes"]


@pytest.mark.parametrize("recipe", available("recipe"))
def test_every_recipe_is_planned_as_it_stands(recipe: str) -> None:
    composed = compose(recipe, stand_ins=True)
    tree = {**plan(composed.config, Assumptions()), "open": list(composed.open)}
    assert tree["refused"] == []
    assert ("a run must be told" in text(tree)) == bool(composed.open)
    assert set(composed.open) <= {"data.path", "initial.path", *(f"data.stages.{i}.seed" for i in range(9))}


def test_what_a_plan_does_without_a_run_does_not() -> None:
    with pytest.raises(InputError, match=r"data\.stages\.1\.seed has no value"):
        compose("apertus_70b_pretrain")
    assert compose("apertus_70b_pretrain", ["data.stages.1.seed=7"], stand_ins=True).open == (
        "data.path",
        *(f"data.stages.{i}.seed" for i in (2, 3, 4)),
    )
