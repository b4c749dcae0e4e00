"""Killed in every stage of its data, a run goes on at the exact sample, and its relaunch is identical."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.stages import stage_at
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.step_log import read_steps
from apertus_nemo.testing.ranks import Parent
from tests.crash.kills import Kill, Survivor, same
from tests.crash.test_start_again import lines
from tests.integration.command import ranks_of, shell, started, wait_for
from tests.integration.runs import Run
from tests.integration.test_relaunch_verb import TENSORS, apertus, copy_of_the_source
from tests.integration.test_stages import STAGED

IN_EACH_STAGE = [Kill("step", 2), Kill("step", 5), Kill("step", 8)]  # of an attempt: steps 2, 5 and (from 4 on) 11
AT_BOUNDARIES = [Kill("commit", 1), Kill("committed", 1), Kill("step", 1), Kill("committed", 2)]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "kills"),
    [
        pytest.param("one", IN_EACH_STAGE, id="one in each stage"),
        pytest.param("one", AT_BOUNDARIES, id="one at boundaries"),
        pytest.param("dp2", IN_EACH_STAGE, id="dp2 in each stage"),
        pytest.param("pp2", IN_EACH_STAGE, id="pp2 in each stage"),
    ],
)
def test_killed_in_ranks(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path, layout: str, kills: list[Kill]
) -> None:
    undisturbed = runs(layout, *STAGED)
    directory = Survivor(parent, corpus, tmp_path / "run", layout, *STAGED).survive(kills)
    same(directory, undisturbed.directory, undisturbed.steps)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("corpus")
def test_the_recipe_is_killed_in_each_stage_and_relaunched(cache: Path, tmp_path: Path) -> None:
    source = copy_of_the_source(tmp_path / "source")
    environment = {**shell(cache, tmp_path / "home"), "PYTHONPATH": str(source)}
    train = ["train", "-q", "--run-dir", "run", "recipe=tiny_stages", "trainer.checkpoint_every_steps=8"]
    run, config = tmp_path / "run", compose("tiny_stages").config
    plan = BatchPlan.from_config(config)
    met = []
    for step in (10, 26, 38):
        with started(train, folder=tmp_path, environment=environment) as process:
            wait_for(lambda: lines(run) >= 2 + step, timeout_s=200.0, what=f"step {step}")  # noqa: B023
            for pid in [process.pid, *ranks_of(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=60.0)
        last = [record.step for record in read_steps(run / "steps")][-1]
        met.append(stage_at(config, plan.batch_at(last)[0]).name)
    assert met == ["code", "mixed", "cooldown"]
    code, out, err = apertus(source, "train", "-q", "--resume", "run", folder=tmp_path, environment=environment)
    assert code == 0, err
    assert out.startswith("44 steps, ")
    tokens = [record.consumed_tokens for record in read_steps(run / "steps")][1:]
    steps = [8 * 128] * 28 + [16 * 128] * 6 + [16 * 256] * 10
    assert tokens == [sum(steps[: i + 1]) for i in range(44)]
    assert sorted(path.name for path in RunDirectory(run).attempts.iterdir()) == ["000", "001", "002", "003"]
    code, out, err = apertus(source, "verify", "run", folder=tmp_path, environment=environment)
    assert code == 0, out + err

    code, out, err = apertus(source, "relaunch", "run", "--run-dir", "again", folder=tmp_path, environment=environment)
    assert code == 0, out + err
    assert f"identical, 44 of 44 steps, {TENSORS} of {TENSORS} tensors\n" in out
    assert (tmp_path / "again" / "lock.json").read_bytes() == (run / "lock.json").read_bytes()
