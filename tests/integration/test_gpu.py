"""One GPU, bf16: the same bits each time and after a kill, and the model that a CPU and transformers compute.

`pytest -m gpu`; nobody has run these yet.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.record.state import StateDigest
from apertus_nemo.record.step_log import StepRecord, read_steps
from apertus_nemo.testing.ranks import Parent
from tests.integration.command import TRAIN, apertus, ranks_of, shell, started, wait_for
from tests.integration.runs import SAVED_STEP, SQUEEZED, STEPS

GPU = ("trainer=gpu", "trainer.devices=1")
CPU = ("trainer.precision=bf16",)
START_S = 300.0

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def trained(cache: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(name, *overrides)`: a run from the command line, once each."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = shell(cache, folder / "home")

    def call(name: str, *overrides: str) -> Path:
        if not (folder / name).exists():
            done = apertus(
                [*TRAIN, "-q", "--run-dir", name, *SQUEEZED, *overrides], folder=folder, environment=environment
            )
            assert done.returncode == 0, done.stderr
        return folder / name

    call.environment = environment  # type: ignore[attr-defined]
    return call


def steps_of(run: Path) -> dict[int, StepRecord]:
    return {record.step: record for record in read_steps(run / "steps")}


def state_of(run: Path, step: int) -> bytes:
    return (run / f"states/step-{step:09d}.json").read_bytes()


def test_two_runs_are_identical(trained: Callable[..., Path]) -> None:
    first, second = trained("first", *GPU), trained("second", *GPU)
    assert steps_of(first) == steps_of(second)
    assert state_of(first, STEPS) == state_of(second, STEPS)
    assert (first / "lock.json").read_bytes() == (second / "lock.json").read_bytes()


def test_killed_it_goes_on_to_the_same_bits(trained: Callable[..., Path]) -> None:
    first = trained("first", *GPU)
    folder, environment = first.parent, trained.environment  # type: ignore[attr-defined]
    words = [*TRAIN, "-q", "--run-dir", "killed", *SQUEEZED, *GPU]
    with started(words, folder=folder, environment=environment) as process:
        saved = folder / f"killed/checkpoints/step-{SAVED_STEP:09d}"
        wait_for(saved.is_dir, timeout_s=START_S, what="a checkpoint")
        for pid in [process.pid, *ranks_of(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60.0)
    done = apertus(["train", "-q", "--resume", "killed"], folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr
    assert steps_of(folder / "killed") == steps_of(first)
    assert state_of(folder / "killed", STEPS) == state_of(first, STEPS)


def test_it_is_the_run_of_a_cpu(trained: Callable[..., Path]) -> None:
    """The same weights and samples; losses and norms as far as bf16 carries."""
    ours, theirs = trained("first", *GPU), trained("cpu", *CPU)
    start, other = (StateDigest.from_bytes(state_of(run, 0), what="state") for run in (ours, theirs))
    assert start.digest_of_kind("weight") == other.digest_of_kind("weight")
    for step in range(1, STEPS + 1):  # step 0 is the state before the first
        mine, record = steps_of(ours)[step], steps_of(theirs)[step]
        assert (mine.batch_digest, mine.learning_rate) == (record.batch_digest, record.learning_rate)
        assert mine.loss == pytest.approx(record.loss, rel=1e-2)
        assert mine.grad_norm == pytest.approx(record.grad_norm, rel=5e-2)


def test_transformers_computes_the_same(trained: Callable[..., Path], parent: Parent, tmp_path: Path) -> None:
    checkpoint = trained("first", *GPU) / f"checkpoints/step-{STEPS:09d}"
    arguments = {
        "checkpoint": str(checkpoint),
        "folder": str(tmp_path / "hf"),
        "overrides": [*SQUEEZED, *GPU],
    }
    (answer,) = parent.run("tests.cases.gpu:logits", arguments=arguments, timeout_s=280.0)
    assert answer["same_argmax"] >= 0.99
    assert answer["close"] >= 0.95
