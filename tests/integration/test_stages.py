"""Stages: mixture, order and length of the samples change, the batch doubles, and nobody notices but the record."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.data import manifest as manifests
from apertus_nemo.data.mixture import sources
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.stages import StagePlan, stage_at
from tests.integration.runs import SQUEEZED, STEPS, Run
from tests.integration.test_layouts import FIRST_STEP, LATER_FACTOR, deviations

MIXED = "mixture:[{source:library,weight:0.75},{source:documentation,weight:0.25}]"
LAST = "mixture:[{source:documentation},{source:library}]"
STAGES = (  # 3 steps, then 6 with the doubling of the batch after the second, then 3
    f"{{name:first,from_sample:0,{MIXED}}}",
    "{name:second,from_sample:12,seed:5,seq_length:96,mixture:[{source:library}]}",
    f"{{name:third,from_sample:52,seed:6,seq_length:128,{LAST}}}",
)
STAGED = (
    f"data.stages=[{','.join(STAGES)}]",
    "trainer.checkpoint_every_steps=3",  # both boundaries, the middle of the second stage, the end
)
NAMES = ["first"] * 3 + ["second"] * 6 + ["third"] * 3
TOKENS = [4 * 64] * 3 + [4 * 96] * 2 + [8 * 96] * 4 + [8 * 128] * 3  # of each step
SOON = ("dp2", "pp2")  # messages between pipeline stages have other shapes from one step to the next
LATER = ("tp2_sp", "cp2", "pp2_vpp2", "tp2_dp2")
OTHERS = [*SOON, *(pytest.param(name, marks=pytest.mark.full) for name in LATER)]


def test_the_record_counts_every_token_of_every_stage(runs: Callable[..., Run]) -> None:
    steps = runs("one", *STAGED).steps
    config = compose("tiny_pretrain", [*SQUEEZED, *STAGED]).config
    plan = BatchPlan.from_config(config)
    assert [stage_at(config, plan.batch_at(step)[0]).name for step in range(1, STEPS + 1)] == NAMES
    assert [steps[step].consumed_tokens for step in range(1, STEPS + 1)] == [sum(TOKENS[: i + 1]) for i in range(STEPS)]
    assert [steps[step].global_batch_size for step in range(1, STEPS + 1)] == [4] * 5 + [8] * 7
    assert steps[STEPS].loss < steps[1].loss - 0.1  # type: ignore[operator]
    digests = {steps[step].batch_digest for step in range(1, STEPS + 1)}
    assert len(digests) == STEPS
    plain = runs("one").steps  # the same recipe without stages reads other samples
    assert not digests & {plain[step].batch_digest for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("layout", OTHERS)
def test_every_layout_is_one_process_across_the_boundaries(runs: Callable[..., Run], layout: str) -> None:
    """To the tolerances of test_layouts.py."""
    one, mine = runs("one", *STAGED), runs(layout, *STAGED)
    for step, record in one.steps.items():
        for value in ("batch_digest", "global_batch_size", "consumed_samples", "consumed_tokens", "learning_rate"):
            assert getattr(mine.steps[step], value) == getattr(record, value), (step, value)
    assert mine.steps[0].state_digest == one.steps[0].state_digest
    moved = runs("one", *STAGED, perturb=1)
    for value in ("loss", "grad_norm"):
        allowed = [max(FIRST_STEP, LATER_FACTOR * seen) for seen in deviations(moved, one, value)]
        seen = deviations(mine, one, value)
        assert seen[0] < FIRST_STEP
        assert all(s <= a for s, a in zip(seen, allowed, strict=True)), (value, seen, allowed)


@pytest.mark.parametrize(
    ("layout", "step"),
    [
        ("one", 3),  # exactly at a boundary: the checkpoint is of the stage before
        ("pp2", 9),
        *(
            pytest.param(layout, step, marks=pytest.mark.full)
            for layout, step in (("one", 6), ("dp2", 3), ("cp2", 9), ("pp2_vpp2", 3), ("pp2", 6))
        ),
    ],
)
def test_it_goes_on_at_a_boundary_and_inside_a_stage(runs: Callable[..., Run], layout: str, step: int) -> None:
    whole = runs(layout, *STAGED)
    rest = runs(layout, *STAGED, checkpoint=whole.directory.checkpoint(step))
    assert rest.steps == {number: record for number, record in whole.steps.items() if number > step}
    assert rest.directory.state(STEPS).read_bytes() == whole.directory.state(STEPS).read_bytes()


def test_parts_of_the_embedded_text(corpus: Path) -> None:
    """Documentation and library are all of it, each document in one; tokens against a count with struct alone."""
    config = compose("tiny_stages", ["data.stages.2.mixture=[]"]).config
    found = sources(config, corpus)
    manifest = manifests.load(corpus)
    names = [entry.name for entry in manifest.inputs]
    lengths = struct.unpack_from(f"<{len(names)}i", (corpus / "corpus.idx").read_bytes(), 34)
    for name, start in (("documentation", "topics/"), ("library", "library/")):
        inside = [i for i, document in enumerate(names) if document.startswith(start)]
        assert list(range(found[name].first, found[name].end)) == inside
        assert found[name].tokens == sum(lengths[i] for i in inside) > 100_000
        assert not found[name].whole
    assert found["documentation"].tokens + found["library"].tokens == found[""].tokens == manifest.tokens
    assert found[""].whole


def test_the_recipe_has_three_stages_and_a_doubling() -> None:
    config = compose("tiny_stages").config
    stages, plan = StagePlan.from_config(config).stages, BatchPlan.from_config(config)
    assert [(s.name, plan.steps_before(s.to_sample)) for s in stages] == [("code", 20), ("mixed", 34), ("cooldown", 44)]
    assert plan.sizes == (8, 16)
    assert stages[1].from_sample < plan.starts[1] < stages[1].to_sample
    assert len({s.seq_length for s in stages}) == len({s.seed for s in stages}) == 2
