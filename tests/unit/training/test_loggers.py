"""Curves, read back with the tools that people read them with; and that a chart which fails costs one line."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.schema import to_tree
from apertus_nemo.testing.ranks import Parent

NO_WANDB = importlib.util.find_spec("wandb") is None


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of an event folder as TensorBoard shows it: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def draw(
    parent: Parent, folder: Path, *overrides: str, first_step: int = 1, last_step: int = 4, **options: Any
) -> dict[str, Any]:
    arguments = {
        "folder": str(folder),
        "overrides": list(overrides),
        "first_step": first_step,
        "last_step": last_step,
        **options,
    }
    (got,) = parent.run("tests.cases.loggers:charts", arguments=arguments)
    return dict(got)


@pytest.mark.parametrize("torn", [0, 1, 9, 40], ids=lambda torn: f"{torn} bytes torn")
def test_a_run_that_goes_on_draws_every_step_once(parent: Parent, tmp_path: Path, torn: int) -> None:
    attempts = [[0, 1, 7], [1, 5, 6], [10, 7, 9]]  # checkpoints after steps 4 and 6
    arguments = {"folder": str(tmp_path), "torn": torn, "attempts": attempts}
    parent.run("tests.cases.loggers:tensorboard", arguments=arguments)
    assert len(list(tmp_path.iterdir())) == 3
    found = curves(tmp_path)
    expected = {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 10, 8: 10, 9: 10}
    if torn:
        del expected[6]  # the kill took this one; training would do it again, but the second attempt was not told to
    assert dict(found["attempt"]) == expected
    assert [step for step, _ in found["attempt"]] == sorted(expected)
    assert dict(found["loss"]) == pytest.approx({step: 1 / step for step in expected})


def test_tensorboard_shows_what_the_steps_gave(parent: Parent, tmp_path: Path) -> None:
    got = draw(parent, tmp_path, first_step=39, last_step=44)  # the batch doubles after step 40
    assert got["warnings"] == []
    found = {tag: dict(points) for tag, points in curves(tmp_path / "logs" / "tensorboard").items()}
    run = compose("tiny_pretrain", []).config
    plan = BatchPlan.from_config(run)
    steps = list(range(39, 45))
    speed = found.pop("tokens_per_second")
    assert list(speed) == steps
    assert all(value > 0 for value in speed.values())
    assert found == {
        "loss": pytest.approx({step: 8 / step for step in steps}),
        "grad_norm": pytest.approx({step: 1 / step for step in steps}),
        "learning_rate": pytest.approx(dict.fromkeys(steps, 3e-3)),  # the stable part
        "consumed_tokens": {step: plan.consumed_samples(step) * 256 for step in steps},
    }
    assert found["consumed_tokens"][44] == (40 * 8 + 4 * 16) * 256


def test_nothing_is_drawn_where_nothing_is_asked_for(parent: Parent, tmp_path: Path) -> None:
    got = draw(parent, tmp_path, "trainer.tensorboard=false")
    assert got == {"warnings": [], "median": got["median"], "wandb": False}
    assert os.listdir(tmp_path) == []


def test_a_chart_costs_next_to_nothing(parent: Parent, tmp_path: Path) -> None:
    got = draw(parent, tmp_path, last_step=60)
    assert got["median"] < 1e-3  # of a step of about 100 ms of the smallest model; some 50 us where it is quiet


def test_a_full_disk_costs_one_line(parent: Parent, tmp_path: Path) -> None:
    got = draw(parent, tmp_path, last_step=20, largest_file_bytes=1000)
    assert got["warnings"] == [
        "TensorBoard is left out from now on, the run goes on without it: [Errno 27] File too large"
    ]
    found = curves(tmp_path / "logs" / "tensorboard")  # what fitted can be read
    assert [step for step, _ in found["loss"]] == list(range(1, len(found["loss"]) + 1))
    assert 1 < len(found["loss"]) < 10


def test_a_folder_that_cannot_be_made_costs_one_line(parent: Parent, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    [warning] = draw(parent, tmp_path)["warnings"]
    assert warning.startswith("TensorBoard is left out from now on, the run goes on without it: [Errno 20] Not a dir")


def test_wandb_that_is_not_installed_costs_one_line(parent: Parent, tmp_path: Path) -> None:
    got = draw(parent, tmp_path, "trainer.wandb=offline", without="wandb")
    [warning] = got["warnings"]
    assert warning.startswith("Weights & Biases is left out from now on, the run goes on without it: ")
    assert warning.endswith(": install wandb, or leave out trainer.wandb")
    assert len(curves(tmp_path / "logs" / "tensorboard")["loss"]) == 4


@pytest.mark.skipif(NO_WANDB, reason="wandb is not installed")
def test_wandb_offline(parent: Parent, tmp_path: Path) -> None:
    overrides = ("trainer.wandb=offline", "trainer.wandb_project=apples")
    got = draw(parent, tmp_path, *overrides)
    assert (got["warnings"], got["wandb"]) == ([], True)
    (found,) = parent.run("tests.cases.loggers:stored_by_wandb", arguments={"folder": str(tmp_path)})
    assert found["run"] == ["ab" * 16, "apples", "tiny_pretrain"]
    config = to_tree(compose("tiny_pretrain", list(overrides)).config)
    assert {key: value for key, value in found["config"].items() if not key.startswith("_")} == config
    assert [row["step"] for row in found["history"]] == [1, 2, 3, 4]
    assert [row["loss"] for row in found["history"]] == [8.0, 4.0, 8 / 3, 2.0]
    assert set(found["history"][0]) == {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "consumed_tokens",
        "tokens_per_second",
    }
    names = {path.name for path in tmp_path.rglob("*")}
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log", "diff.patch", ".netrc"}


@pytest.mark.skipif(NO_WANDB, reason="wandb is not installed")
def test_wandb_without_a_key_or_a_network_costs_one_line(parent: Parent, tmp_path: Path) -> None:
    got = draw(parent, tmp_path, "trainer.wandb=online")
    [warning] = got["warnings"]
    assert warning.startswith("Weights & Biases is left out from now on, the run goes on without it: ")
    assert len(curves(tmp_path / "logs" / "tensorboard")["loss"]) == 4
