"""Runs that start from weights which exist: the same bits at every layout, the same record, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.record.state import StateDigest
from apertus_nemo.testing.ranks import Parent, RankFailed
from tests.integration.command import apertus, ranks_of, shell, started, wait_for
from tests.integration.runs import SQUEEZED, STEPS, Run

FIRST_STEP = 1e-6  # relative, as in test_layouts.py
SHORT = ["one", "tp2", "pp2_vpp2"]
FULL = ["pp2", "dp2", "cp2", "tp2_pp2"]


def weights_of(run: Run, step: int) -> str:
    path = run.directory.state(step)
    return StateDigest.from_bytes(path.read_bytes(), what="state").digest_of_kind("weight")


def export(parent: Parent, run: Run, folder: Path, *, shard_bytes: int = 1_000_000) -> Path:
    """The last checkpoint of a run as a folder, in several files unless told otherwise; once a session."""
    if not folder.exists():
        arguments = {"checkpoint": str(run.directory.checkpoint(STEPS)), "folder": str(folder), "overrides": []}
        parent.run("tests.cases.convert:exported", arguments={**arguments, "shard_bytes": shard_bytes})
    return folder


@pytest.fixture(scope="session")
def folder(runs: Callable[..., Run], parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(parent, runs("one"), tmp_path_factory.mktemp("initial") / "hf")


def child(runs: Callable[..., Run], layout: str, kind: str, path: Path, expected: str) -> Run:
    overrides = (
        f"initial.kind={kind}",
        f"initial.path={path}",
        "trainer.max_steps=1",
        "optim.lr=1e-4",
        "optim.min_lr=0",
    )
    return runs(layout, *overrides, initial=str(path), initial_weights=expected)


@pytest.mark.parametrize("layout", [*SHORT, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)])
def test_the_same_weights_at_every_layout(runs: Callable[..., Run], folder: Path, layout: str) -> None:
    """From a folder: the bits that the parent logged at its last step, and the loss of one process."""
    expected = weights_of(runs("one"), STEPS)
    one, mine = (child(runs, name, "hugging_face", folder, expected) for name in ("one", layout))
    assert weights_of(mine, 0) == expected
    assert mine.directory.state(0).read_bytes() == one.directory.state(0).read_bytes()
    first, alone, drawn = (run.steps[1].loss or 0.0 for run in (mine, one, runs("one")))
    assert abs(first / alone - 1) < FIRST_STEP
    assert alone < drawn - 0.1, "it starts from what the parent has learnt"


@pytest.mark.parametrize(
    ("parent_layout", "layout"),
    [("one", "tp2"), *(pytest.param(*pair, marks=pytest.mark.full) for pair in [("tp2", "pp2"), ("pp2_vpp2", "dp2")])],
)
def test_a_checkpoint_is_as_good_as_its_folder(
    runs: Callable[..., Run], folder: Path, parent_layout: str, layout: str
) -> None:
    """From the checkpoint of a run of one layout, in another."""
    first = runs(parent_layout)
    expected = weights_of(first, STEPS)
    mine = child(runs, layout, "run", first.directory.checkpoint(STEPS), expected)
    assert weights_of(mine, 0) == expected
    if parent_layout == "one":
        again = child(runs, layout, "hugging_face", folder, expected)
        assert mine.directory.state(0).read_bytes() == again.directory.state(0).read_bytes()
        assert mine.steps[1] == again.steps[1]


def test_weights_of_another_step_are_told(runs: Callable[..., Run], folder: Path) -> None:
    other = weights_of(runs("one"), 0)
    with pytest.raises(RankFailed, match=rf"have the digest [0-9a-f]+, and {other} was logged of them"):
        child(runs, "one", "hugging_face", folder, other)


def test_a_value_that_is_not_finite(runs: Callable[..., Run], folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "hf")
    file = max(path.glob("model-*.safetensors"), key=lambda each: b"model.norm.weight" in each.read_bytes())
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + length])["model.norm.weight"]["data_offsets"][0]
    data[8 + length + start : 12 + length + start] = b"\x00\x00\xc0\x7f"
    file.write_bytes(data)
    with pytest.raises(RankFailed, match=r"model\.norm\.weight holds a value that is not finite"):
        child(runs, "one", "hugging_face", path, "")


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("corpus")
def test_the_record_of_a_child(cache: Path, tmp_path: Path) -> None:
    """Killed and resumed, relaunched with its parent elsewhere: identical; with one byte changed: refused by name."""
    environment = shell(cache, tmp_path / "home")

    def command(*words: str) -> tuple[int, str, str]:
        done = apertus(words, folder=tmp_path, environment=environment)
        return done.returncode, done.stdout, done.stderr

    first = [*SQUEEZED, "trainer.max_steps=2"]
    code, _, err = command("train", "-q", "--run-dir", "first", *first)
    assert code == 0, err
    second = [*SQUEEZED, "initial.kind=run", "initial.path=first", "trainer.max_steps=6"]
    words = ["train", "-q", "--run-dir", "second", *second, "trainer.checkpoint_every_steps=2"]
    with started(words, folder=tmp_path, environment=environment) as process:
        wait_for((tmp_path / "second/checkpoints/step-000000002").is_dir, timeout_s=120, what="a checkpoint")
        for rank in ranks_of(process.pid):
            os.kill(rank, signal.SIGKILL)
        process.wait(60)
    code, out, err = command("train", "-q", "--resume", "second")
    assert code == 0, out + err

    lock = json.loads((tmp_path / "second/lock.json").read_bytes())["initial_state"]
    state = StateDigest.from_bytes((tmp_path / "first/states/step-000000002.json").read_bytes(), what="state")
    assert (lock["kind"], lock["carries"], lock["precision"]) == ("run", ["weights"], "fp32")
    assert lock["parent"]["step"] == 2
    assert lock["weights_digest"] == state.digest_of_kind("weight")
    assert str(tmp_path) not in json.dumps(lock)

    (tmp_path / "first").rename(tmp_path / "moved")
    code, _, err = command("relaunch", "second", "-q", "--trust")
    assert code == 2
    assert (
        f"initial.path={tmp_path / 'first'}: there is no such folder; --initial DIR says where the weights are now"
        in err
    )
    code, out, err = command("relaunch", "second", "-q", "--trust", "--initial", "moved")
    assert code == 0, out + err
    assert "identical, 6 of 6 steps" in out

    file = next(path for path in sorted((tmp_path / "moved/checkpoints/step-000000002/weights").iterdir()))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, _, err = command("relaunch", "second", "-q", "--trust", "--initial", "moved")
    assert code == 2
    assert file.name in err
    shutil.rmtree(tmp_path / "moved")
