"""Where attempts, stages and checkpoints stand on the curves, and what is said of each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.record.attempts import Outcome, write_outcome
from apertus_nemo.report.gather import gather
from apertus_nemo.report.marks import first_steps, marks
from tests.unit.report.records import events, sealed


def attempt(number: int, first: int | None, cause: str) -> dict[str, Any]:
    return {"cause": cause, "first_step": first, "number": number}


def stage(begin: int, end: int, batch: int, **data: Any) -> dict[str, Any]:
    return {"data": data, "from_sample": begin, "global_batch_size": batch, "to_sample": end}


def told(*arguments: Any, **options: Any) -> list[tuple[int, str]]:
    return [(mark["step"], mark["text"]) for mark in marks(*arguments, **options)]


def test_attempts() -> None:
    """Of one that did no step there is nothing to mark, and the next one says how it ended."""
    found = [attempt(0, 1, "killed"), attempt(1, None, "failed"), attempt(2, 4, "hung"), attempt(3, 4, "finished")]
    assert told(None, found, []) == [
        (4, "attempt 2 begins; the one before: failed"),
        (4, "attempt 3 begins; the one before: hung"),
    ]


def test_stages_say_what_changes() -> None:
    stages = [
        stage(0, 20, 4, stage="short", seq_length=64, mixture=[1]),
        stage(20, 76, 8, stage="short", seq_length=64, mixture=[1]),
        stage(76, 92, 8, stage="long", seq_length=128, mixture=[2]),
        stage(92, 100, 8, stage="long", seq_length=128, mixture=[2]),
    ]
    assert told({"stages": stages}, [], []) == [
        (6, "stage 2 begins: batch 4 to 8"),
        (13, "stage 3 begins: long, sequence 64 to 128, another mixture"),
        (15, "stage 4 begins"),
    ]


def test_the_first_step_of_a_stage_is_that_of_the_batch_plan() -> None:
    chance = random.Random(3)
    for _ in range(200):
        starts, sizes = [0], [chance.randrange(1, 9)]
        for _ in range(chance.randrange(4)):
            starts.append(starts[-1] + sizes[-1] * chance.randrange(1, 7))
            sizes.append(chance.randrange(1, 9))
        plan = BatchPlan(tuple(starts), tuple(sizes), starts[-1] + sizes[-1] * 3)
        stages = [stage(a, b, n) for a, b, n in zip(starts, (*starts[1:], plan.train_samples), sizes, strict=True)]
        assert first_steps(stages) == [plan.steps_before(start) + 1 for start in starts]


@pytest.mark.parametrize("stages", [None, 7, [1], [{}], [stage(0, 1, 0)], [{**stage(0, 9, 1), "to_sample": "x"}]])
def test_odd_stages_are_not_marked(stages: Any) -> None:
    assert first_steps(stages) is None
    assert marks({"stages": stages}, [], []) == []


def test_of_the_steps_that_are_drawn(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run")
    events(run, 0, range(1, 11))
    events(run, 1, range(11, 21))
    write_outcome(run, 0, Outcome("killed", "rank 1", 3, step=10))
    whole, part = (gather([str(run)], check=False, steps=steps)["runs"][0]["marks"] for steps in ((1, None), (11, 15)))
    assert [(mark["kind"], mark["step"]) for mark in whole] == [("checkpoint", 10), ("attempt", 11), ("checkpoint", 20)]
    assert [(mark["kind"], mark["step"]) for mark in part] == [("attempt", 11)]
    lock = sealed(tmp_path / "long", steps=0, saved=(), finished=False)
    assert gather([str(lock)], check=False)["runs"][0]["marks"] == []
