"""`verify`: what it says of whole, unfinished and changed records; tests/property/test_tampering.py holds places."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from apertus_nemo.audit.compare import compare
from apertus_nemo.audit.finding import Finding
from apertus_nemo.audit.verification import Verification
from apertus_nemo.audit.verify import verify as verify_record
from apertus_nemo.audit.verify_report import text
from apertus_nemo.cli.main import main
from apertus_nemo.errors import InputError
from apertus_nemo.record.attempts import Outcome, write_outcome
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.checkpoint_list import CheckpointList, read_list, write_list
from apertus_nemo.record.seal import write_end
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter
from tests.golden.test_record import RUN as GOLDEN
from tests.unit.audit.sealed import SEGMENT_LINES, make_sealed, sha256
from tests.unit.record.example import make, step


def verify(folder: Path) -> Verification:
    return verify_record(folder, segment_lines=SEGMENT_LINES)


def places(result: Verification) -> list[str]:
    return [finding.place for finding in result.findings]


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", segment_lines=100_000)
    result = verify_record(str(run))
    size = f"{result.size_bytes:,}"
    assert text(result).splitlines()[:4] == [
        "whole: finished at step 20",
        f"  lock digest sha256:{sha256((run / 'lock.json').read_bytes())}",
        f"  record digest sha256:{sha256((run / 'end.json').read_bytes())}",
        f"  checked: 22 lines of the step log, 3 states, 2 checkpoints, {result.files} files with {size} bytes",
    ]
    everything = [p for p in run.rglob("*") if p.is_file() and "steps" not in p.parts and p.suffix != ".log"]
    assert result.files == len(everything)
    assert result.size_bytes == sum(p.stat().st_size for p in everything)


def test_an_unfinished_run_is_whole_so_far(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    result = verify(run)
    assert (result.findings, result.finished, result.sealed_step, result.exit_code) == ([], False, 20, 0)
    assert text(result).startswith("whole so far: unfinished, at step 20\n")
    assert result.notes == ["unfinished: 20 steps of 25 planned, sealed up to step 20"]
    assert any("only the end of a run is sealed for good" in item for item in result.not_checked)


def test_an_unfinished_log_is_protected_up_to_its_last_seal(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    lines = (run / "steps" / "000002.jsonl").read_bytes().splitlines(keepends=True)
    (run / "steps" / "000002.jsonl").write_bytes(b"".join(lines[:-1]))
    assert places(verify(run)) == ["steps/000002.jsonl line 6 (step 20)"]


def test_lines_after_the_last_seal_may_be_lost_unseen_and_it_is_said(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False, saved=(10,))
    (run / "steps" / "000002.jsonl").unlink()
    result = verify(run)
    assert (result.findings, result.last_step, result.sealed_step) == ([], 14, 10)
    assert result.notes == ["unfinished: 14 steps of 25 planned, sealed up to step 10"]


def test_a_torn_last_line_of_an_unfinished_run_is_what_a_crash_leaves(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False, saved=(10,))
    with open(run / "steps" / "000002.jsonl", "ab") as stream:
        stream.write(b'{"batch_digest":"')
    result = verify(run)
    assert result.findings == []
    assert result.notes[0].startswith("steps/000002.jsonl line 7 is torn: it was cut off, or a crash left it; ")


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False, saved=(10,))
    for name in ("steps", "states", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "attempts" / "000" / "seal.json").unlink()
    result = verify(run)
    assert (result.findings, result.last_step, result.notes[0]) == ([], None, "no step was logged")


def test_a_relaunched_and_resumed_log_with_several_seals(tmp_path: Path) -> None:
    """A later attempt repeats steps, and seals a longer log than the one before."""
    run = make_sealed(tmp_path / "run")
    seals = [json.loads((run / "attempts" / name / "seal.json").read_bytes()) for name in ("000", "001")]
    assert [seal["lines"] for seal in seals] == [12, 22]
    assert verify(run).findings == []


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("lock.json", b"}", "is not the lock of the step log, whose digest is "),
        ("observed.json", b" ", "is not the one of the step log, whose digest is "),
        ("recipe.yaml", b"#", "is not the one that end.json names"),
        ("source.tar", b"x", "is not the one that the lock names"),
        ("source.patch", b"x", "is not the one that the lock names"),
        ("end.json", b" ", "is not canonical JSON (RFC 8785)"),
        ("attempts/000/environment.json", b" ", "is not the one that end.json names"),
        ("attempts/000/seal.json", b" ", "is not canonical JSON (RFC 8785)"),
        ("states/step-000000010.json", b" ", "is not a list of tensors as it is written"),
        ("checkpoints/step-000000010/manifest.json", b" ", "is not the one that end.json names"),
        ("checkpoints/step-000000010/weights/__0_0.distcp", b"x", "has 121 bytes, not 120"),
    ],
)
def test_one_file_with_more_in_it(tmp_path: Path, name: str, change: bytes, what: str) -> None:
    run = make_sealed(tmp_path / "run")
    (run / name).write_bytes((run / name).read_bytes() + change)
    result = verify(run)
    assert places(result) == [name]
    assert result.findings[0].what.startswith(what)
    assert text(result).startswith(f"changed: {name}: {what}")


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda lines: lines[:5] + lines[6:], "line 6 (step 5): step 5 stands where step 4 belongs: step 4 is missing"),
        (lambda lines: lines[:5] + lines[4:], "line 6 (step 3): was inserted"),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "line 4 (step 3): was inserted"),
        (
            lambda lines: [*lines[:3], lines[3].replace(b'"loss":"0x1.4', b'"loss":"0x1.5'), *lines[4:]],
            "line 4 (step 2): was changed: the next line holds another hash of it",
        ),
        (lambda lines: [*lines[:3], b"junk\n", *lines[4:]], "line 4: was changed: is not a line of a step log"),
        (lambda lines: lines[:-1], "line 22 (step 20): the log ends after step 19, but end.json has step 20"),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], "line 22: is torn: it was cut off"),
        (
            lambda lines: [*lines[:-1], lines[-1].replace(b'"loss":"0x1.', b'"loss":"0x0.')],
            "line 22: was changed: ",
        ),
        (
            lambda lines: [*lines[:-1], lines[-1].replace(b'"consumed_samples":', b'"consumed_samples":1')],
            "line 22 (step 20): was changed: end.json holds another hash of it",
        ),
    ],
)
def test_the_words_for_harms_of_a_log(tmp_path: Path, harm: Callable[[list[bytes]], list[bytes]], line: str) -> None:
    run = make_sealed(tmp_path / "run", segment_lines=100_000)
    log = run / "steps" / "000000.jsonl"
    log.write_bytes(b"".join(harm(log.read_bytes().splitlines(keepends=True))))
    first = verify_record(run).findings[0]
    assert f"{first.place}: {first.what}".startswith(f"steps/000000.jsonl {line}")


def test_several_harms_are_all_listed(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run")
    for name in ("recipe.yaml", "states/step-000000000.json", "checkpoints/step-000000020/weights/__1_0.distcp"):
        (run / name).write_bytes(b"other")
    log = run / "steps" / "000001.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"junk\n", *lines[3:]]))
    assert places(verify(run)) == [
        "steps/000001.jsonl line 3",
        "recipe.yaml",
        "states/step-000000000.json",
        "checkpoints/step-000000020/weights/__1_0.distcp",
    ]


def test_a_checkpoint_that_was_removed_is_told(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000000010")
    result = verify(run)
    assert (result.findings, result.checkpoints, result.finished) == ([], [20], True)
    assert (result.removed, result.pruned) == ([10], [])
    assert (
        "checkpoints/step-000000010: is not here, though checkpoints.json names it: somebody removed it, not the run"
        in result.not_checked
    )


@pytest.mark.parametrize("finished", [True, False])
def test_a_checkpoint_that_the_run_pruned_is_told_from_one_that_somebody_removed(
    tmp_path: Path, finished: bool
) -> None:
    run = make_sealed(tmp_path / "run", prune=True, finished=finished)
    result = verify(run)
    assert (result.findings, result.checkpoints, result.finished) == ([], [20], finished)
    assert (result.removed, result.pruned) == ([], [10])
    told = "pruned by the run's own policy (trainer.keep_checkpoints): checkpoint of step 10"
    assert told in result.notes
    assert not any("checkpoint" in item and "not here" in item for item in result.not_checked)
    shutil.rmtree(run / "checkpoints" / "step-000000020")
    result = verify(run)
    assert (result.findings, result.removed, result.pruned) == ([], [20], [10])


def test_a_record_from_before_the_list_of_checkpoints(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    (run / "checkpoints.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000000010")
    result = verify(run)
    assert (result.findings, result.checkpoints, result.removed) == ([], [20], [])
    assert any("manifests of checkpoints: only end.json covers them" in item for item in result.not_checked)


def test_the_list_covers_the_manifests_of_an_unfinished_run(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    file = run / "checkpoints" / "step-000000010" / "manifest.json"
    tree = json.loads(file.read_bytes())
    file.write_bytes(dumps({**tree, "files": {}}))
    found = [(f.file, f.what) for f in verify(run).findings]
    assert found[0] == (
        "checkpoints/step-000000010/manifest.json",
        "is not the one that checkpoints.json names: it was changed or exchanged",
    )
    file.write_bytes(dumps(tree))
    shutil.copytree(file.parent, file.parent.with_name("step-000000015"))
    copied = run / "checkpoints" / "step-000000015" / "manifest.json"
    copied.write_bytes(dumps({**tree, "step": 15}))
    assert [(f.file, f.what) for f in verify(run).findings] == [
        ("checkpoints/step-000000015/manifest.json", "is none that checkpoints.json names: it was added")
    ]
    shutil.rmtree(copied.parent)
    (run / "checkpoints.json").write_bytes((run / "checkpoints.json").read_bytes().replace(b"false", b"true"))
    assert [(f.file, f.what) for f in verify(run).findings] == [
        ("checkpoints.json", "does not have the digest that it names: it was changed after it was written")
    ]


def test_a_checkpoint_that_a_kill_left_between_its_commit_and_its_note(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    listed = read_list(run)
    before = CheckpointList({10: listed.made[10]})
    for list_at_the_kill in (before.begun(listed.made[20]), listed.pruned([10]), before.begun(listed.made[20])):
        write_list(run, list_at_the_kill)
        result = verify(run)
        assert (result.findings, result.checkpoints, result.removed, result.pruned) == ([], [10, 20], [], [])
    shutil.rmtree(run / "checkpoints" / "step-000000020")  # killed before the commit
    result = verify(run)
    assert (result.findings, result.checkpoints, result.removed, result.pruned) == ([], [10], [], [])


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    file = run / "checkpoints" / "step-000000010" / "manifest.json"
    file.write_bytes(dumps({**json.loads(file.read_bytes()), "lock_digest": "1" * 64}))
    found = verify(run).findings
    assert [(f.file, f.what) for f in found] == [
        ("checkpoints/step-000000010/manifest.json", f"is of another run, of the lock digest {'1' * 64}")
    ]


def test_a_checkpoint_of_a_step_that_the_log_does_not_have(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    for name in ("attempts/000/seal.json", "attempts/001/seal.json", "states/step-000000020.json"):
        (run / name).unlink()
    (run / "steps" / "000002.jsonl").unlink()
    assert places(verify(run)) == ["checkpoints/step-000000020/manifest.json"]


def test_an_exchanged_end_is_noticed_by_the_last_attempt(tmp_path: Path) -> None:
    run, other = make_sealed(tmp_path / "run"), make_sealed(tmp_path / "other", steps=19, saved=(10,))
    shutil.copy(other / "end.json", run / "end.json")
    result = verify(run)
    assert (result.findings[0].file, result.finished) == ("end.json", False)
    assert result.findings[0].what.startswith("is not the one that attempts/001/seal.json names")


def test_what_is_beside_a_record_is_said(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "tensorboard").mkdir()
    (run / ".lock.json.12-ab.partial").write_text("of a crash")
    result = verify(run)
    assert result.findings == []
    assert {"notes.txt: no part of a record", "tensorboard: no part of a record"} <= set(result.not_checked)


def test_compare_sees_the_end_too(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", segment_lines=100_000)
    assert compare(run, run).exit_code == 0
    log = run / "steps" / "000000.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(whole[:-1]))
    with pytest.raises(InputError, match=r"the log ends at step 19, but .*end\.json says step 20: lines were cut off"):
        compare(run, run)
    changed = whole[-1].replace(b'"consumed_samples":', b'"consumed_samples":1')
    log.write_bytes(b"".join([*whole[:-1], changed]))
    with pytest.raises(InputError, match=r"the line of step 20 is not the one that .*end\.json names"):
        compare(run, run)


def test_the_frozen_record_is_read(tmp_path: Path) -> None:
    """It was made by hand, and names an observation that never was."""
    assert places(verify_record(GOLDEN)) == ["observed.json"]


def test_records_from_before_the_seals(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (run.path / "source.tar").write_bytes(b"")
    result = verify_record(run.path)
    assert [finding.file for finding in result.findings] in ([], ["source.tar"])
    assert not result.finished


def test_sha256sum_agrees(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run")
    files = json.loads((run / "end.json").read_bytes())["files"]
    given = "".join(f"{digest}  {name}\n" for name, digest in files.items())
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet"], input=given.encode(), cwd=run, check=True, timeout=20
    )
    assert verify(run).record_digest == hashlib.sha256((run / "end.json").read_bytes()).hexdigest()


def test_a_log_of_many_segments(tmp_path: Path) -> None:
    """The quick pass and the slow one agree on what is whole."""
    from apertus_nemo.audit.chain import _quick, _Slow

    folder = tmp_path / "steps"
    with StepLogWriter.open(folder, StepLogHeader("0" * 64, "1" * 32, "0" * 64), segment_lines=7) as log:
        for number in range(1, 101):
            special = float("nan") if number == 50 else float("inf") if number == 51 else 5e-324
            log.append(replace(step(number), loss=special) if 50 <= number < 53 else step(number))
    names = sorted(path.name for path in folder.iterdir())
    slow = _Slow(folder, names, {}, None, 7).run()
    assert (slow.findings, slow.lines, slow.first_step, slow.last_step) == ([], 101, 1, 100)
    ordinary = tmp_path / "ordinary"
    with StepLogWriter.open(ordinary, StepLogHeader("0" * 64, "1" * 32, "0" * 64), segment_lines=7) as log:
        for number in range(1, 101):
            log.append(step(number))
    names = sorted(path.name for path in ordinary.iterdir())
    quick, slow = _quick(ordinary, names, {}, 7), _Slow(ordinary, names, {}, None, 7).run()
    assert quick == slow


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_sealed(tmp_path / "run", segment_lines=100_000)
    assert main(["verify", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["finished"], told["exit_code"], told["findings"]) == ("whole", True, 0, [])
    page = (Path(__file__).parents[3] / "docs" / "verify.md").read_text()
    assert set(re.findall(r"`(\w+)`", page[page.index("`--json`:") :])) >= set(told)
    (run / "recipe.yaml").write_text("other: 1\n")
    assert main(["verify", str(run), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["findings"] == [
        {
            "file": "recipe.yaml",
            "line": None,
            "step": None,
            "what": "is not the one that end.json names: it was changed or exchanged",
        }
    ]
    assert told["verdict"] == "changed"


def test_outcomes_of_attempts(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    write_outcome(run, 0, Outcome("killed", "rank 1 was killed by signal 9", 3, step=99, rank=1, signal=9))
    write_outcome(run, 1, Outcome("stopped", "as asked", 0, step=20))
    assert verify(run).findings == [], "of a killed attempt, lines may be lost with the machine"
    write_outcome(run, 1, Outcome("stopped", "as asked", 0, step=21))
    [finding] = verify(run).findings
    assert finding == Finding("attempts/001/outcome.json", "says that step 21 was done, and the log ends at step 20")
    write_outcome(run, 1, Outcome("finished", "finished at step 20", 0, step=20))
    [finding] = verify(run).findings
    assert finding.file == "end.json"
    assert finding.what == "is missing, though attempts/001/outcome.json says that the run finished: it was removed"
    (run / "attempts" / "001" / "outcome.json").write_bytes(b"{}")
    assert verify(run).findings == [Finding("attempts/001/outcome.json", "is not the outcome of an attempt")]


def test_the_end_covers_the_outcomes_of_earlier_attempts(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run", finished=False)
    write_outcome(run, 0, Outcome("killed", "rank 1 was killed by signal 9", 3))
    header = StepLogHeader(sha256((run / "lock.json").read_bytes()), "1" * 32, "0" * 64)
    with StepLogWriter.open(run / "steps", header, segment_lines=SEGMENT_LINES) as log:
        write_end(run, attempt=1, mark=log.mark())
    write_outcome(run, 1, Outcome("finished", "finished at step 20", 0, step=20))
    result = verify(run)
    assert (result.findings, result.finished) == ([], True)
    assert "attempts/001/outcome.json: written after end.json, so no digest covers it" in result.not_checked
    write_outcome(run, 0, Outcome("killed", "rank 0 was killed by signal 9", 3))
    assert verify(run).findings == [
        Finding("attempts/000/outcome.json", "is not the one that end.json names: it was changed or exchanged")
    ]


def test_an_outcome_that_was_added_to_an_early_record(tmp_path: Path) -> None:
    run = make_sealed(tmp_path / "run")
    write_outcome(run, 0, Outcome("stopped", "as asked", 0))
    assert verify(run).findings == [Finding("attempts/000/outcome.json", "was added after end.json was written")]
