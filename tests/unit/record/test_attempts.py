"""How attempts ended is read as it was written, one by one; what is broken is said and hides nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.record.attempts import (
    CAUSES,
    MAX_BYTES,
    MAX_MESSAGE,
    AttemptProgress,
    Outcome,
    outcome_from_bytes,
    progress_from_bytes,
    read_attempts,
    write_outcome,
    write_progress,
)
from apertus_nemo.record.canonical import dumps
from tests.unit.audit.sealed import make_sealed

MIDDLE = AttemptProgress("training", first_step=11, step=23, steps=60, loss=2.5, tokens=4096, elapsed_ms=2000)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with three attempts."""
    for number in range(3):
        (tmp_path / "attempts" / f"{number:03d}").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("cause", CAUSES)
def test_an_outcome_is_read_as_it_was_written(run: Path, cause: str) -> None:
    outcome = Outcome(cause, "rank 1 was killed by signal 9", 3, step=7, rank=1, signal=9)
    write_outcome(run, 1, outcome)
    write_progress(run, 1, MIDDLE)
    attempt = read_attempts(run)[1]
    assert (attempt.outcome, attempt.progress, attempt.broken) == (outcome, MIDDLE, None)
    assert (attempt.cause, attempt.message) == (cause, "rank 1 was killed by signal 9")
    assert attempt.tokens_per_second == 2048.0
    assert sorted(path.name for path in (run / "attempts" / "001").iterdir()) == ["outcome.json", "progress.json"]


def test_what_is_not_there_says_how_it_ended(run: Path) -> None:
    write_progress(run, 0, AttemptProgress("starting"))
    write_progress(run, 1, MIDDLE)
    write_progress(run, 2, MIDDLE)
    killed = "the launcher was killed, or lost its machine; last seen at: "
    assert [(a.cause, a.message) for a in read_attempts(run, running=True)] == [
        ("launcher gone", killed + "starting"),
        ("launcher gone", killed + "step 23"),
        ("running", "training"),
    ]
    assert read_attempts(run, running=False)[2].cause == "launcher gone"
    unknown = read_attempts(run, running=None)[2]
    assert (unknown.cause, unknown.message) == ("unknown", "no outcome: it goes on, or its launcher was killed")


def test_records_from_before_outcomes(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run")
    assert [(a.cause, a.message) for a in read_attempts(run)] == [
        ("unknown", "no outcome was recorded"),
        ("finished", "finished at step 20"),
    ]
    assert read_attempts(tmp_path / "nothing") == []


def test_a_message_is_one_line_of_text_that_fits(run: Path) -> None:
    write_outcome(run, 0, Outcome("failed", "first\n\n  second\udcff\n" + "x" * 5000, 4))
    message = read_attempts(run)[0].message
    assert message.startswith("first;   second\\udcff; xxx")
    assert (len(message), message[-4:]) == (MAX_MESSAGE, " ...")


def outcome(**changes: object) -> bytes:
    tree = {
        "attempt": 0, "cause": "killed", "exit_code": 3, "format": 1, "kind": "apertus-nemo outcome",
        "message": "m", "rank": 1, "signal": 9, "step": None,
    }  # fmt: skip
    return dumps({**tree, **changes})


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it: is not JSON: Expecting value (line 1, column 1)"),
    "truncated": (outcome()[:-9], "it: is not JSON: Unterminated string starting at (line 1, column 120)"),
    "not UTF-8": (b'{"a":"\xff"}', "it: is not UTF-8 at byte 6"),
    "spaces": (json.dumps(json.loads(outcome())).encode(), "it: is not canonical JSON (RFC 8785): it was changed "),
    "a list": (b"[]", "it: is not the outcome of an attempt"),
    "another file": (outcome(kind="apertus-nemo seal"), "it: is not the outcome of an attempt"),
    "format": (outcome(format=2), "it: has format 2; this version reads 1"),
    "a key more": (outcome(host="x"), "it: is not the outcome of an attempt"),
    "of another attempt": (outcome(attempt=4), "it: is of attempt 4, not of attempt 0"),
    "cause": (outcome(cause="bored"), "it: is not the outcome of an attempt"),
    "a rank that is none": (outcome(rank=True), "it: is not the outcome of an attempt"),
    "exit code": (outcome(exit_code=256), "it: is not the outcome of an attempt"),
    "no message": (outcome(message=""), "it: is not the outcome of an attempt"),
    "nesting": (b"[" * 500 + b"]" * 500, "it: is nested deeper than 64 levels"),
    "huge": (b" " * (MAX_BYTES + 1), f"it: has {MAX_BYTES + 1} bytes, more than the {MAX_BYTES} that are read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_outcome_is_refused_and_hides_no_other(run: Path, case: str) -> None:
    data, message = BROKEN[case]
    assert outcome_from_bytes(outcome(), what="it", attempt=0).rank == 1
    with pytest.raises(InputError) as error:
        outcome_from_bytes(data, what="it", attempt=0)
    assert str(error.value).startswith(message)
    write_outcome(run, 1, Outcome("stopped", "as asked", 0))
    (run / "attempts" / "000" / "outcome.json").write_bytes(data)
    first, second, _ = read_attempts(run)
    assert (first.cause, first.message) == ("unknown", "its outcome cannot be read")
    assert first.broken is not None
    assert (second.cause, second.broken) == ("stopped", None)


def test_a_broken_progress_is_refused_and_the_outcome_stays(run: Path) -> None:
    write_progress(run, 0, MIDDLE)
    write_outcome(run, 0, Outcome("stopped", "as asked", 0))
    path = run / "attempts" / "000" / "progress.json"
    good = json.loads(path.read_bytes())
    for change in ({"tokens": -1}, {"loss": "2.5"}, {"loss": 2.5}, {"step": "7"}, {"phase": None}, {"format": 9}):
        path.write_bytes(dumps({**good, **change}))
        with pytest.raises(InputError, match=r"^it: "):
            progress_from_bytes(path.read_bytes(), what="it")
        attempt = read_attempts(run)[0]
        assert (attempt.cause, attempt.progress) == ("stopped", None)
        assert attempt.broken is not None
    path.unlink()
    path.symlink_to("outcome.json")
    assert read_attempts(run)[0].broken is not None, "links are not followed"
