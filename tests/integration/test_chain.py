"""A model's history from cold, as typed: pre-trained, exported, fine-tuned from the folder, and tuned on from that run.

The fine-tuning is killed in the middle and goes on; nobody can tell, and its relaunch is identical.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.state import StateDigest
from apertus_nemo.record.step_log import read_steps
from tests.integration.command import TRAIN, apertus, ranks_of, shell, started, wait_for
from tests.integration.test_relaunch_verb import copy_of_the_source

STEPS = 6  # of the fine-tuning
EVERY = 2  # steps between its checkpoints
Typed = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def typed(cache: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Typed:
    """`typed("train", ...)` in the folder of the chain, without a traceback."""
    folder = tmp_path_factory.mktemp("chain")
    source = copy_of_the_source(tmp_path_factory.mktemp("source") / "source")  # the checkout may change meanwhile
    environment = {**shell(cache, folder / "home"), "PYTHONPATH": str(source)}

    def call(*words: str, folder: Path = folder) -> subprocess.CompletedProcess[str]:
        done = apertus(words, folder=folder, environment=environment)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    call.folder, call.environment = folder, environment  # type: ignore[attr-defined]
    return call


@pytest.fixture(scope="module")
def chain(typed: Typed) -> Path:
    """The folder with `base`, its export `hf`, `tuned` from that, which was killed once, and `child` from `tuned`."""
    folder, environment = typed.folder, typed.environment  # type: ignore[attr-defined]

    def good(*words: str) -> None:
        done = typed(*words)
        assert done.returncode == 0, done.stdout + done.stderr

    good(*TRAIN, "-q", "--run-dir", "base", "trainer.max_steps=3")
    good("convert", "export", "base", "hf")
    tuned = [
        *(*TRAIN, "-q", "--run-dir", "tuned", "recipe=tiny_sft", "initial.kind=hugging_face", "initial.path=hf"),
        *(f"trainer.max_steps={STEPS}", f"trainer.checkpoint_every_steps={EVERY}"),
    ]
    with started(tuned, folder=folder, environment=environment) as process:
        wait_for((folder / f"tuned/checkpoints/step-{EVERY:09d}").is_dir, timeout_s=200.0, what="a checkpoint")
        for pid in [process.pid, *ranks_of(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60.0)
    assert not (folder / "tuned/end.json").exists(), "it was killed before its end"
    good("train", "-q", "--resume", "tuned")
    tuning = ["recipe=tiny_sft", "initial.kind=run", "initial.path=tuned", "trainer.max_steps=1"]
    good(*TRAIN, "-q", "--run-dir", "child", *tuning)
    return Path(folder)


def weights_of(run: Path, step: int) -> str:
    path = run / f"states/step-{step:09d}.json"
    return StateDigest.from_bytes(path.read_bytes(), what="state").digest_of_kind("weight")


def walked(typed: Typed, *words: str, folder: Path) -> tuple[int, dict[str, Any]]:
    done = typed("lineage", *words, "--json", folder=folder)
    return done.returncode, json.loads(done.stdout)


def test_killed_and_relaunched_it_is_identical(typed: Typed, chain: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"  # not beside the chain: it would stand in for its original
    steps = [record.step for record in read_steps(chain / "tuned/steps")]
    assert steps == list(range(STEPS + 1))
    assert sorted(path.name for path in (chain / "tuned/attempts").iterdir()) == ["000", "001"]
    assert weights_of(chain / "tuned", 0) == weights_of(chain / "base", 3)
    assert typed("verify", "tuned").returncode == 0
    done = typed("relaunch", "tuned", "-q", "--trust", "--run-dir", str(again))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"identical, {STEPS} of {STEPS} steps" in done.stdout
    assert (again / "lock.json").read_bytes() == (chain / "tuned/lock.json").read_bytes()
    assert weights_of(again, STEPS) == weights_of(chain / "tuned", STEPS)


def test_its_lineage_reaches_the_run_that_drew_its_weights(typed: Typed, chain: Path) -> None:
    code, tree = walked(typed, "child", folder=chain)
    assert (code, tree["end"]) == (0, "beginning")
    assert tree["reason"] == f"{chain / 'base'} draws its weights from the seed 28"
    assert [(member["kind"], member["name"]) for member in tree["members"]] == [
        ("run", "tiny_sft"),
        ("run", "tiny_sft"),
        ("run", "tiny_pretrain"),
    ]
    assert [(link["through"], link["step"]) for link in tree["links"]] == [("run", STEPS), ("hugging_face", 3)]
    files = {  # of the checkpoint; the folder was read instead
        "run": {"files of the checkpoint, by its manifest": "equal"},
        "hugging_face": {"files of the checkpoint": "not checked"},
    }
    for link in tree["links"]:
        assert {check["what"]: check["result"] for check in link["checks"]} == {
            "lock digest": "equal",
            f"weights after step {link['step']}": "equal",
            "weights that it began with": "equal",
            **files[link["through"]],
        }, link
    assert typed("lineage", "child").stdout.splitlines()[0] == "back to its beginning, 2 links"


@pytest.mark.parametrize(("hit", "step"), [("base", 3), ("tuned", STEPS)])
def test_a_link_that_was_tampered_with_is_named(typed: Typed, chain: Path, hit: str, step: int) -> None:
    """One number of one tensor of a state."""
    path = chain / hit / f"states/step-{step:09d}.json"
    before = path.read_bytes()
    lane = json.loads(before)["tensors"][0][4][0].encode()
    path.write_bytes(before.replace(lane, b"0" * len(lane)))
    try:
        code, tree = walked(typed, "child", folder=chain)
    finally:
        path.write_bytes(before)
    assert (code, tree["end"]) == (1, "contradicted")
    assert str(path) in tree["reason"], tree["reason"]
    assert walked(typed, "child", folder=chain)[0] == 0
