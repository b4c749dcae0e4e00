"""How attempts ended, told from what they left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.report.attempts import MAX_ATTEMPTS, Attempt, last_error, read_attempts
from apertus_nemo.report.throughput import read_throughput
from tests.unit.report.records import events, sealed

TRACEBACK = """\
starting
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    train()
apertus_nemo.errors.UnfitEnvironment: step 5: loss is nan, gradient norm is nan: lower optim.lr
"""


def attempts(run: Path, *, every: int | None = 10, planned: int | None = 25) -> list[Attempt]:
    return read_attempts(run, read_throughput(run).spells, checkpoint_every_steps=every, planned_steps=planned)[0]


def test_finished_after_a_kill(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run")
    events(run, 0, range(1, 14))
    events(run, 1, range(11, 21))
    first, second = attempts(run)
    assert (first.ended, first.cause) == ("killed", "no rank left an error; its last checkpoint is of step 10")
    assert (first.first_step, first.last_step, first.sealed_step) == (1, 13, 10)
    assert (second.ended, second.cause, second.last_step) == ("finished", "did the last step, 20", 20)


def test_stopped_where_no_checkpoint_was_due(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run", finished=False)
    events(run, 1, range(11, 21))
    second = attempts(run, every=0)[1]
    assert (second.ended, second.cause) == ("stopped", "as asked, with a checkpoint after step 20")
    second = attempts(run, every=10)[1]  # one was due: it cannot be told
    assert (second.ended, second.cause) == (
        "unknown",
        "it left no end: killed, stopped, or at work on another machine",
    )
    assert attempts(run, every=10)[0].cause == "it left no end: stopped or killed"


def test_an_error_is_the_last_line_of_the_traceback(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run", finished=False)
    (run / "attempts/001/rank-10.log").write_text(TRACEBACK.replace("step 5", "step 6"))
    (run / "attempts/001/rank-2.log").write_bytes(b"\xff" * 40_000 + TRACEBACK.encode())
    second = attempts(run)[1]
    assert second.ended == "failed"
    assert second.cause == "rank 2: UnfitEnvironment: step 5: loss is nan, gradient norm is nan: lower optim.lr"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("all is well\nError: no traceback\n", None),
        (TRACEBACK + "\nDuring handling, another:\n\n" + TRACEBACK.replace("5", "9"), "UnfitEnvironment: step 9"),
        ("Traceback (most recent call last):\n  File x\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("Traceback (most recent call last):\n  File x\n", None),
    ],
)
def test_last_error(text: str, error: str | None) -> None:
    found = last_error(text)
    assert found == error or (found is not None and error is not None and found.startswith(error))


def test_hostile_output_is_shown_and_does_nothing(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run", finished=False)
    (run / "attempts/001/rank-0.log").write_text(TRACEBACK.replace("step 5", "\x1b[2J\u202e<b>"))
    assert "UnfitEnvironment: \\x1b[2J\\u202e<b>: loss" in attempts(run)[1].cause
    (run / "attempts/001/rank-0.log").unlink()
    os.mkfifo(run / "attempts/001/rank-0.log")
    assert attempts(run)[1].ended == "unknown"


def test_a_run_that_a_process_holds(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run", finished=False)
    code = (
        "import fcntl, os, sys; d = os.open(sys.argv[1], os.O_RDONLY); "
        "fcntl.flock(d, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        first, second = attempts(run)
        assert (first.ended, second.ended) == ("unknown", "running")
        process.communicate(timeout=20)
    assert attempts(run)[1].ended == "unknown"


def test_an_attempt_on_another_machine(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run")
    (run / "attempts/001/observed.json").write_bytes(b'{"host":"other","version":1}')
    assert [attempt.other_machine for attempt in attempts(run)] == [[], ["host"]]


def test_very_many_attempts_are_not_all_listed(tmp_path: Path) -> None:
    for number in range(MAX_ATTEMPTS + 30):
        (tmp_path / "attempts" / f"{number:03d}").mkdir(parents=True)
    found, left_out = read_attempts(tmp_path, {}, checkpoint_every_steps=None, planned_steps=None)
    assert (len(found), left_out) == (MAX_ATTEMPTS, 30)
    assert (found[0].number, found[-1].number) == (0, MAX_ATTEMPTS + 29)
