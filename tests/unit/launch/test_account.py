"""What the launcher leaves of an attempt: how far it came and how it ended, whatever ended it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apertus_nemo.errors import ApertusError, InputError, UnfitEnvironment
from apertus_nemo.launch.account import Account, Ending
from apertus_nemo.record.attempts import Attempt, Outcome, read_attempts
from apertus_nemo.record.run_dir import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """One attempt."""
    directory = RunDirectory(tmp_path / "run")
    directory.attempt(0).mkdir(parents=True)
    return directory


def account(directory: RunDirectory, warnings: list[str] | None = None) -> Account:
    return Account(directory, 0, secrets=["hunter22"], warn=([] if warnings is None else warnings).append)


def step(number: int) -> dict[str, object]:
    return {"event": "step", "step": number, "steps": 60, "loss": 2.5, "tokens": 512 * number, "seconds": number / 2}


def ended(directory: RunDirectory, error: BaseException | None, ending: Ending | None = None) -> Attempt:
    kept = account(directory)

    def run() -> None:
        with kept.kept():
            kept.event({"event": "phase", "text": "building model and data"})
            for number in (1, 2, 3):
                kept.event(step(number))
            kept.ending = ending
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    [attempt] = read_attempts(directory.path)
    return attempt


def test_the_first_file_is_there_before_any_rank_is(directory: RunDirectory) -> None:
    with account(directory).kept():
        [attempt] = read_attempts(directory.path, running=True)
        assert (attempt.cause, attempt.message) == ("running", "starting")
    assert read_attempts(directory.path)[0].outcome == Outcome("finished", "finished", 0)


def test_the_last_progress_is_written_though_it_came_at_once(directory: RunDirectory) -> None:
    attempt = ended(directory, None)
    assert attempt.outcome == Outcome("finished", "finished at step 3", 0, step=3)
    assert attempt.progress is not None
    assert (attempt.progress.first_step, attempt.progress.step, attempt.progress.steps) == (1, 3, 60)
    assert attempt.tokens_per_second == 1024.0


@pytest.mark.parametrize(
    ("error", "ending", "outcome"),
    [
        (
            UnfitEnvironment("rank 1 was killed; see {run}/attempts/000/rank-1.log"),
            Ending("killed", 1, 9),
            Outcome("killed", "rank 1 was killed; see attempts/000/rank-1.log", 3, 3, rank=1, signal=9),
        ),
        (InputError("no\nsuch thing hunter22"), None, Outcome("failed", "no; such thing (secret)", 2, 3)),
        (ApertusError(""), None, Outcome("failed", "no reason was given", 4, 3)),
        (ZeroDivisionError("x"), None, Outcome("failed", "ZeroDivisionError: x", 4, 3)),
        (KeyboardInterrupt(), None, Outcome("interrupted", "the command was ended by SIGINT", 130, 3, signal=2)),
        (SystemExit(143), None, Outcome("interrupted", "the command was ended by SIGTERM", 143, 3, signal=15)),
    ],
)
def test_whatever_ends_it(
    directory: RunDirectory, error: BaseException, ending: Ending | None, outcome: Outcome
) -> None:
    error.args = tuple(a.replace("{run}", str(directory.path)) if isinstance(a, str) else a for a in error.args)
    assert ended(directory, error, ending).outcome == outcome


def test_a_disk_that_refuses_does_not_end_the_run(directory: RunDirectory) -> None:
    warnings: list[str] = []
    kept = account(directory, warnings)
    folder = directory.attempt(0)
    with kept.kept():
        (folder / "progress.json").unlink()
        folder.rmdir()
        os.symlink("/proc/nothing", folder)
        kept.event(step(1))
    [warning] = warnings
    assert warning == (
        "how this attempt ended could not be recorded: "
        f"could not write {folder / 'outcome.json'}: No such file or directory"
    )
