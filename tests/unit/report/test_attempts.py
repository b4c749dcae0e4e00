"""What a report says of attempts: their launchers' words, and what is left where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.attempts import AttemptProgress, Outcome, write_outcome, write_progress
from apertus_nemo.report.attempts import MAX_ATTEMPTS, last_error, read_attempts
from apertus_nemo.report.throughput import read_throughput
from tests.unit.report.records import T0, events, sealed

TRACEBACK = """\
starting
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    train()
apertus_nemo.errors.UnfitEnvironment: step 5: loss is nan, gradient norm is nan: lower optim.lr
"""


def attempts(run: Path) -> list[dict[str, Any]]:
    return read_attempts(run, read_throughput(run).spells)[0]


def test_what_launchers_wrote(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run")
    write_progress(run, 0, AttemptProgress("training", 1, 13, 25, 5.0, 13 * 256, 4000))
    write_outcome(run, 0, Outcome("killed", "rank 0 was killed by signal 9", 3, 13, 0, 9))
    write_outcome(run, 1, Outcome("finished", "20 steps", 0, 20))
    events(run, 0, range(1, 14))
    events(run, 1, range(11, 21))
    first, second = attempts(run)
    assert first == {
        "began_s": T0,
        "cause": "killed",
        "ended_s": T0 + 13,
        "exit_code": 3,
        "first_step": 1,
        "last_step": 13,
        "message": "rank 0 was killed by signal 9",
        "number": 0,
        "other_machine": [],
        "sealed_step": 10,
        "tokens_per_second": 832.0,
    }
    assert (second["cause"], second["first_step"], second["last_step"]) == ("finished", 11, 20)


def test_an_early_record_has_the_last_line_of_a_traceback(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run", finished=False)
    assert [item["cause"] for item in attempts(run)] == ["unknown", "unknown"]
    (run / "attempts/001/rank-10.log").write_text(TRACEBACK.replace("step 5", "step 6"))
    (run / "attempts/001/rank-2.log").write_bytes(b"\xff" * 40_000 + TRACEBACK.encode())
    second = attempts(run)[1]
    assert second["cause"] == "failed"
    assert second["message"] == "rank 2: UnfitEnvironment: step 5: loss is nan, gradient norm is nan: lower optim.lr"
    write_outcome(run, 1, Outcome("stopped", "as asked", 0, 20))
    assert attempts(run)[1]["message"] == "as asked"


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
    assert "UnfitEnvironment: \\x1b[2J\\u202e<b>: loss" in attempts(run)[1]["message"]
    (run / "attempts/001/rank-0.log").unlink()
    os.mkfifo(run / "attempts/001/rank-0.log")
    assert attempts(run)[1]["cause"] == "unknown"


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
        assert [item["cause"] for item in attempts(run)] == ["unknown", "running"]
        process.communicate(timeout=20)
    assert attempts(run)[1]["cause"] == "unknown"


def test_an_attempt_on_another_machine(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run")
    (run / "attempts/001/observed.json").write_bytes(b'{"host":"other","version":1}')
    assert [item["other_machine"] for item in attempts(run)] == [[], ["host"]]


def test_very_many_attempts_are_not_all_listed(tmp_path: Path) -> None:
    for number in range(MAX_ATTEMPTS + 30):
        (tmp_path / "attempts" / f"{number:03d}").mkdir(parents=True)
    found, left_out = read_attempts(tmp_path, {})
    assert (len(found), left_out) == (MAX_ATTEMPTS, 30)
    assert (found[0]["number"], found[-1]["number"]) == (0, MAX_ATTEMPTS + 29)
