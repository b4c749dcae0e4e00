"""A rank that hangs is found, named and ended, with the stacks of all; the run goes on afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apertus_nemo.audit.status import status_of
from apertus_nemo.audit.verify import verify
from apertus_nemo.record.attempts import Outcome, read_attempts
from tests.integration.command import ROOT, TRAIN, alive, apertus, ranks_of, shell, started, wait_for
from tests.integration.runs import SQUEEZED

TIMEOUT_S = 8
END_S = 60.0  # from the hang to the end, on a busy machine
HEARTBEAT = f"trainer.heartbeat_timeout_s={TIMEOUT_S}"
COLLECTIVE = f"trainer.collective_timeout_s={TIMEOUT_S}"
OVERRIDES = [*SQUEEZED[:-1], "parallel=dp2", "schedule.train_samples=4000", "trainer.checkpoint_every_steps=4"]

HANGING = """
def wait_for_ever() -> None:
    import os, time
    while os.path.exists({flag!r}):
        time.sleep(0.2)

"""


@pytest.fixture
def environment(cache: Path, corpus: Path, tmp_path: Path) -> dict[str, str]:
    """A user's shell; the embedded corpus is there."""
    return shell(cache, tmp_path / "home")


def logged(run: Path) -> int:
    """Lines of the step log."""
    log = run / "steps" / "000000.jsonl"
    return len(log.read_bytes().splitlines()) if log.exists() else 0


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("overrides", "gave_up"),
    [
        ([HEARTBEAT], ""),
        (
            ["trainer.heartbeat_timeout_s=0", f"trainer.collective_timeout_s={TIMEOUT_S}"],
            ", and rank 0 gave up waiting",
        ),
    ],
    ids=["heartbeat", "collective"],
)
def test_a_stopped_rank(tmp_path: Path, environment: dict[str, str], overrides: list[str], gave_up: str) -> None:
    run = tmp_path / "run"
    arguments = [*TRAIN, "--run-dir", "run", *OVERRIDES, *overrides]
    with started(arguments, folder=tmp_path, environment=environment) as process:
        wait_for(lambda: logged(run) > 7, timeout_s=240.0, what="six steps")
        pids = ranks_of(process.pid)
        wait_for(lambda: status_of(run).phase == "training", timeout_s=10.0, what="its progress, written once a second")
        now = status_of(run)
        assert (now.state, now.attempts, now.steps, now.phase) == ("running", 1, 502, "training")
        assert now.step is not None
        assert now.step >= 6
        since = time.monotonic()
        with stopped(pids[1]):
            _, err = process.communicate(timeout=END_S)
    assert TIMEOUT_S <= time.monotonic() - since < END_S
    assert process.returncode == 3
    line = err.splitlines()[-1]
    told = re.fullmatch(
        r"apertus-nemo: rank 1 hangs (?:in|while saving) step ([0-9]+): "
        rf"no rank went on for [0-9]+ s{gave_up}; its process is stopped, "
        r"so its stack cannot be had; the stacks of all ranks are in run/attempts/000/rank-\*\.log; the run was "
        r"ended and can be resumed",
        line,
    )
    assert told is not None, line
    if not gave_up:
        assert "most recent call first" in (run / "attempts" / "000" / "rank-0.log").read_text()
    assert not any(map(alive, pids))
    [attempt] = read_attempts(run)
    assert attempt.outcome is not None
    assert (attempt.cause, attempt.outcome.rank, attempt.outcome.exit_code) == ("hung", 1, 3)
    assert attempt.message == line.removeprefix("apertus-nemo: ").replace("run/attempts", "attempts")
    assert int(told[1]) >= 6
    after = status_of(run)
    assert (after.state, after.last_failure) == ("failed", f"attempt 0: hung: {attempt.message}")


@pytest.mark.full
@pytest.mark.timeout(500)
def test_a_rank_that_sleeps_for_ever_and_the_run_that_goes_on(tmp_path: Path, environment: dict[str, str]) -> None:
    flag = tmp_path / "hang"
    flag.touch()
    source = tmp_path / "source"
    for part in ("apertus_nemo", "recipes", "requirements"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    recorder = source / "apertus_nemo" / "training" / "recorder.py"
    text = recorder.read_text()
    place = "        self._heart.beat(step=step)\n"
    assert text.count(place) == 1
    call = f"        if step == 6 and trainer.global_rank == 1:\n            wait_for_ever()\n{place}"
    recorder.write_text(text.replace(place, call) + HANGING.format(flag=str(flag)))
    environment["PYTHONPATH"] = str(source)
    arguments = [*TRAIN, "--run-dir", "run", *OVERRIDES, HEARTBEAT, "schedule.train_samples=100"]
    done = apertus(arguments, folder=tmp_path, environment=environment, timeout_s=300.0)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    log = (tmp_path / "run" / "attempts" / "000" / "rank-1.log").read_text()
    assert re.search(r'^  File ".*/recorder\.py", line [0-9]+ in wait_for_ever$', log, re.MULTILINE)
    assert re.fullmatch(
        r"apertus-nemo: rank 1 hangs in step 5: no rank went on for [0-9]+ s; it is in wait_for_ever \(recorder\.py "
        r"line [0-9]+\); the stacks of all ranks are in run/attempts/000/rank-\*\.log; the run was ended and can be "
        r"resumed",
        done.stderr.splitlines()[-1],
    ), done.stderr
    other = (tmp_path / "run" / "attempts" / "000" / "rank-0.log").read_text()
    assert re.search(r"^Current thread .*\n(  File .*\n){0,6}  File .*torch/distributed/", other, re.MULTILINE)
    flag.unlink()
    again = ["train", "--resume", "run"]
    watching = ["logs", "run", "--follow", "--wait", "120", "--json"]
    with started(watching, folder=tmp_path, environment=environment) as process:
        done = apertus(again, folder=tmp_path, environment=environment, timeout_s=300.0)
        told, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    *lines, last = map(json.loads, told.splitlines())
    assert {(line["attempt"], line["rank"]) for line in lines} >= {(0, 0), (0, 1)}
    assert any("in wait_for_ever" in line["text"] for line in lines)
    assert last == {"attempt": 1, "cause": "finished", "event": "ended", "message": "finished at step 15"}
    assert done.returncode == 0, done.stderr
    assert "going on after step 4 of " in done.stderr
    first, second = read_attempts(tmp_path / "run")
    assert (first.cause, second.outcome) == ("hung", Outcome("finished", "finished at step 15", 0, step=15))
    assert verify(tmp_path / "run").findings == []
