"""`runs`: the state of each run as it stands on the disk, whatever stands there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apertus_nemo.audit.status import RunStatus, find_runs, last_step, look, status_of
from apertus_nemo.audit.status_table import table
from apertus_nemo.cli.main import main
from apertus_nemo.errors import InputError
from apertus_nemo.launch.resume import claimed
from apertus_nemo.record.attempts import AttemptProgress, Outcome, write_outcome, write_progress
from apertus_nemo.record.canonical import dumps
from tests.unit.audit.sealed import make_sealed, sha256
from tests.unit.record.example import step

LONG = 100_000  # lines of a segment
ROOT = Path(__file__).resolve().parents[3]


def begun(path: Path, *, steps: int = 20) -> Path:
    """Two attempts, and no end."""
    return make_sealed(path, finished=False, steps=steps, saved=(10,), segment_lines=LONG)


def progress(number: int, seconds: int = 4) -> AttemptProgress:
    return AttemptProgress("training", 11, number, 25, 2.5, tokens=4096, elapsed_ms=1000 * seconds)


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "a", segment_lines=LONG)
    last = step(20)
    assert status_of(run) == RunStatus(
        run=str(run),
        state="finished",
        stage=1,
        stages=2,
        step=20,
        steps=25,
        tokens=last.consumed_tokens,
        loss=last.loss,
        attempts=2,
    )


@pytest.mark.parametrize(
    ("cause", "state", "told"),
    [
        ("stopped", "stopped", False),
        ("killed", "failed", True),
        ("failed", "failed", True),
        ("hung", "failed", True),
        ("interrupted", "interrupted", True),
    ],
)
def test_the_state_is_how_the_last_attempt_ended(tmp_path: Path, cause: str, state: str, told: bool) -> None:
    run = begun(tmp_path / "a")
    write_progress(run, 1, progress(20))
    write_outcome(run, 1, Outcome(cause, "because", 3, step=20))
    found = status_of(run)
    assert (found.state, found.broken, found.attempts) == (state, None, 2)
    assert found.tokens_per_second == 1024.0
    assert found.last_failure == (f"attempt 1: {cause}: because" if told else None)


def test_a_launcher_that_is_gone_and_a_failure_of_before(tmp_path: Path) -> None:
    run = begun(tmp_path / "a")
    write_outcome(run, 0, Outcome("killed", "rank 1 was killed", 3))
    write_outcome(run, 1, Outcome("stopped", "as asked", 0))
    assert status_of(run).last_failure == "attempt 0: killed: rank 1 was killed"
    (run / "attempts" / "001" / "outcome.json").unlink()
    write_progress(run, 1, progress(20))
    found = status_of(run)
    assert found.state == "interrupted"
    assert found.last_failure == (
        "attempt 1: launcher gone: the launcher was killed, or lost its machine; last seen at: step 20"
    )


def test_a_run_goes_on_where_the_kernel_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "a")
    write_progress(run, 1, AttemptProgress("building model and data"))
    with claimed(run):
        found = status_of(run)
        assert (found.state, found.phase, found.last_failure) == ("running", "building model and data", None)
        assert "running (building model and data)" in table([RunStatus("a", "running", phase=found.phase)])
    assert status_of(run).state == "interrupted"

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert status_of(run).state == "unknown"
    write_outcome(run, 1, Outcome("stopped", "as asked", 0))
    assert status_of(run).state == "stopped", "what is written needs no lock"


def test_a_launcher_in_another_process_and_its_end(tmp_path: Path) -> None:
    run = begun(tmp_path / "a")
    write_progress(run, 1, progress(20))
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from apertus_nemo.launch.resume import claimed\n"
        f"with claimed(Path({str(run)!r})): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert status_of(run).state == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert status_of(run).state == "interrupted"
    finally:
        process.kill()
        process.communicate()


def test_a_run_that_has_only_just_begun(tmp_path: Path) -> None:
    run = begun(tmp_path / "a", steps=0)
    for path in run.glob("attempts/*/*"):
        path.unlink()
    for path in (*run.glob("attempts/*"), run / "attempts"):
        path.rmdir()
    found = status_of(run)
    assert (found.state, found.step, found.steps, found.tokens, found.attempts) == ("interrupted", 0, 25, None, 0)
    for segment in (run / "steps").iterdir():
        segment.unlink()
    assert (status_of(run).step, status_of(run).broken) == (None, None)
    assert table([status_of(run)]).splitlines()[1].split()[-6:] == ["1/2", "-/25", "-", "-", "-", "0"]


BROKEN = {
    "lock.json": (b"{}", "lock.json: is not a lock"),
    "lock.json, cut": (b'{"stages":[', "lock.json: is not JSON: Expecting value (line 1, column 12)"),
    "lock.json, deep": (b"[" * 9999 + b"]" * 9999, "lock.json: is nested deeper than 64 levels"),
    "lock.json, stages": (b'{"stages":[{"to_sample":"x"}]}', "lock.json: its stages do not say where they end"),
    "lock.json, no stages": (b'{"stages":[5]}', "lock.json: its stages do not say where they end"),
    "lock.json, another": (b'{"stages":[]}', "lock.json is not the lock of the step log: it was changed or exchanged"),
    "steps/000000.jsonl": (b"x" * 99999, "steps/000000.jsonl: its last line is longer than 4096 bytes"),
    "steps/000001.jsonl": (
        b"hello\n",
        (
            "steps/000001.jsonl, last line: is not a line of a step log: it: is not JSON: Expecting value "
            "(line 1, column 1)"
        ),
    ),
    "end.json": (b"\0", "end.json: is not JSON: Expecting value (line 1, column 1)"),
    "attempts/001/outcome.json": (b"[]", "attempts/001/outcome.json: is not the outcome of an attempt"),
    "attempts/001/progress.json": (b"\xff", "attempts/001/progress.json: is not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_broken_record_is_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, reason = BROKEN[case]
    runs = [begun(tmp_path / name) for name in "abc"]
    (runs[1] / case.partition(",")[0]).write_bytes(data)
    found = list(look(find_runs([tmp_path])))
    assert [status.broken for status in found] == [None, reason, None]
    assert [status.state for status in found] == ["interrupted", "broken", "interrupted"]
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].endswith(f"cannot be read: {reason}")


def test_a_stage_has_the_name_that_the_recipe_gives_it(tmp_path: Path) -> None:
    run = begun(tmp_path / "a")
    tree = json.loads((run / "lock.json").read_bytes())
    for stage, name in zip(tree["stages"], ("web", "code"), strict=True):
        stage["data"]["stage"] = name
    (run / "lock.json").write_text(json.dumps(tree))
    log = run / "steps" / "000000.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    header = json.loads(lines[0])
    header["lock_digest"] = sha256((run / "lock.json").read_bytes())
    log.write_bytes(b"".join([dumps(header) + b"\n", *lines[1:]]))
    found = status_of(run)
    assert (found.stage, found.stages, found.stage_name, found.broken) == (1, 2, "web", None)
    assert table([found]).splitlines()[1].split()[2] == "web"


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    run = begun(tmp_path / "a")
    (run / "lock.json").unlink()
    os.mkfifo(run / "lock.json")
    (run / "end.json").symlink_to("nothing")
    found = status_of(run)
    assert found.state == "broken"
    assert found.broken is not None
    assert "lock.json is not an ordinary file" in found.broken
    assert "end.json: Too many levels of symbolic links" in found.broken


def test_an_outcome_that_contradicts_the_record(tmp_path: Path) -> None:
    run = begun(tmp_path / "a")
    write_outcome(run, 1, Outcome("finished", "finished at step 20", 0, step=20))
    found = status_of(run)
    assert (found.state, found.broken) == ("broken", "attempt 1 says that the run finished, and there is no end.json")


def test_a_torn_line_and_later_segments(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "a", finished=False)  # 8 lines a segment
    with open(run / "steps" / "000002.jsonl", "ab") as stream:
        stream.write(b'{"batch_digest":"')
    record = last_step(run)
    assert record is not None
    assert record.step == 20
    (run / "steps" / "000003.jsonl").write_bytes(b"")
    record = last_step(run)
    assert record is not None
    assert record.step == 20


def test_runs_are_found_in_folders_and_in_folders_of_sweeps(tmp_path: Path) -> None:
    for name in ("tiny-10", "tiny-9", "sweep/001", "sweep/000"):
        begun(tmp_path / name, steps=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("tiny-9")
    names = ["sweep/000", "sweep/001", "tiny-9", "tiny-10"]
    assert find_runs([tmp_path]) == [tmp_path / name for name in names]
    assert find_runs([tmp_path / "tiny-9", tmp_path / "sweep", tmp_path / "tiny-9"]) == [
        tmp_path / name for name in ("tiny-9", "sweep/000", "sweep/001")
    ]
    with pytest.raises(InputError) as error:
        find_runs([tmp_path / "none"])
    assert str(error.value) == (
        f"{tmp_path / 'none'} is not a folder: give a run directory, or a folder that holds some"
    )


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr() == ("", "no runs in runs\n")
    run = begun(tmp_path / "runs" / "a\x1b[2J")
    write_outcome(run, 1, Outcome("failed", "a \x1b]0;title\x07 name", 2))
    make_sealed(tmp_path / "runs" / "b", segment_lines=LONG)
    assert main(["runs"]) == 0
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable()
    head, first, second = text.splitlines()
    assert head.split()[:6] == ["RUN", "STATE", "STAGE", "STEP", "TOKENS", "LOSS"]
    assert first.startswith(r"runs/a\x1b[2J  failed      1/2  20/25")
    assert first.endswith(r"attempt 1: failed: a \x1b]0;title\x07 name")
    assert second.split() == ["runs/b", "finished", "1/2", "20/25", "5.12k", f"{step(20).loss:.4f}", "-", "2"]
    assert main(["runs", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in tree["runs"]] == ["failed", "finished"]
    assert tree["format"] == 1
    assert main(["runs", "none"]) == 2
    assert capsys.readouterr().err == (
        "apertus-nemo: none is not a folder: give a run directory, or a folder that holds some\n"
    )


def test_the_table_is_cut_to_a_terminal() -> None:
    status = RunStatus("a", "failed", last_failure="x" * 500)
    assert [len(line) for line in table([status], width=80).splitlines()] == [72, 80]
    assert len(table([status])) > 500


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12288, "12.3k"), (163_840, "164k"), (15 * 10**12, "15T")],
)
def test_tokens(tokens: int, text: str) -> None:
    assert text in table([RunStatus("a", "failed", tokens=tokens)]).splitlines()[1].split()


def test_hundreds_of_runs_in_a_moment(tmp_path: Path) -> None:
    """Goal: 300 runs with long logs within a second of processor time; benchmarks/runs.py measures."""
    first = begun(tmp_path / "run-0")
    for number in range(1, 300):
        folder = tmp_path / f"run-{number}"
        for name in ("attempts/000", "attempts/001", "steps"):
            (folder / name).mkdir(parents=True)
        for name in ("lock.json", "steps/000000.jsonl"):
            os.link(first / name, folder / name)
    began = time.process_time()
    assert len(list(look(find_runs([tmp_path])))) == 300
    assert time.process_time() - began < 3.0
