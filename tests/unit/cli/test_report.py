"""`apertus-nemo report`: where the file goes, what is printed, what is refused, and what the page is no part of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.audit.compare import compare
from apertus_nemo.audit.verify import verify
from apertus_nemo.cli.main import main
from apertus_nemo.record.copies import pull, push
from apertus_nemo.report.page import MARK
from tests.unit.record.example import make
from tests.unit.report.records import sealed


def test_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sealed(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    data = (run / "report.html").read_bytes()
    assert data.startswith(MARK)
    assert capsys.readouterr().out == (f"{run}/report.html: {len(data):,} bytes\n  whole: finished at step 20\n")
    assert main(["report", str(run)]) == 0  # over the one before
    assert (run / "report.html").read_bytes() == data


def test_a_package_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sealed(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(run)]) == 3
    line = "apertus-nemo: the package plotly.offline is missing: install the locked requirements\n"
    assert capsys.readouterr() == ("", line)
    assert not (run / "report.html").exists()


def test_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        make(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("report.html: ")
    assert lines[3] == "  A and B: identical, 20 of 20 steps, 132 of 132 tensors"
    assert main(["report", "a", "b", "-o", "c.html", "--no-verify"]) == 0
    assert "  A and B: not compared: --no-verify was given\n" in capsys.readouterr().out
    assert (tmp_path / "c.html").read_bytes().startswith(MARK)
    assert not (tmp_path / "a" / "report.html").exists()


def test_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sealed(tmp_path / "run")
    assert main(["report", str(run), "--json", "--steps", "5-7"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["runs"][0]["curves"]["loss"]["steps"] == [5, 6, 7]
    assert (tree["first_step"], tree["last_step"]) == (5, 7)
    assert not (run / "report.html").exists()


def test_a_changed_record_has_a_report_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sealed(tmp_path / "run")
    (run / "recipe.yaml").write_text("changed\n")
    assert main(["report", str(run)]) == 0
    assert "  changed: recipe.yaml: is not the one that end.json names" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["run", "-o", "run/lock.json"], 2, "run/lock.json is there already and is no report of apertus-nemo: name "),
        (["run", "-o", "run"], 2, "run is a folder; name the file of the report"),
        (["run", "-o", "link"], 2, "link is there already and is no report of apertus-nemo"),
        (["run", "-o", "nothing/x.html"], 3, "could not write nothing/x.html: No such file or directory"),
        (["run", "--steps", "7-5"], 2, "--steps '7-5' is no range of steps; write FIRST-LAST, or FIRST- for all "),
        (["run", "--steps", "x"], 2, "--steps 'x' is no range of steps"),
        (["nothing"], 2, "nothing is not a folder"),
        (["nothing://x/y"], 2, "nothing://x/y: nothing is no kind of URL that fsspec knows"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    line: str,
) -> None:
    make(tmp_path / "run")
    (tmp_path / "link").symlink_to("run/lock.json")
    before = (tmp_path / "run" / "lock.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"apertus-nemo: {line}")
    assert err.count("\n") == 1
    assert (tmp_path / "run" / "lock.json").read_bytes() == before


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert main(["report", str(tmp_path), "--json", "-o", "x"]) == 2
    assert "--json prints the data; it goes without --output" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sealed(tmp_path / "run")
    run.chmod(0o500)
    try:
        assert main(["report", str(run)]) == 3
    finally:
        run.chmod(0o700)
    assert "permission denied" in capsys.readouterr().err


def test_a_report_is_no_part_of_a_record(tmp_path: Path) -> None:
    """Neither verify, compare nor a copy sees it, before and after, in a run and in a copy of one."""
    run = sealed(tmp_path / "run")
    before = verify(run)
    plain = push(run, str(tmp_path / "plain"))
    assert main(["report", str(run)]) == 0
    after = verify(run)
    assert (after.findings, after.files, after.size_bytes) == ([], before.files, before.size_bytes)
    assert not any("report" in item for item in after.not_checked)
    assert after.record_digest == before.record_digest
    copied = push(run, str(tmp_path / "copy"))
    assert copied.digest == plain.digest
    assert not (tmp_path / "copy" / "report.html").exists()
    assert push(run, "memory://reports/none").digest == plain.digest
    assert compare(run, tmp_path / "copy").verdict == "identical"
    assert main(["report", str(tmp_path / "copy")]) == 0  # a copy may have one, and is whole with it
    assert verify(tmp_path / "copy").findings == []
    pull(str(tmp_path / "copy"), tmp_path / "back")
    assert not (tmp_path / "back" / "report.html").exists()
    (tmp_path / "copy" / "other.html").write_text("x")
    assert [finding.file for finding in verify(tmp_path / "copy").findings] == ["other.html"]


def test_it_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    run = sealed(tmp_path / "run")
    shutil.rmtree(run / "logs", ignore_errors=True)
    code = (
        "import sys; from apertus_nemo.cli.main import main; code = main(['report', sys.argv[1]]); "
        "heavy = {'torch', 'nemo', 'megatron', 'lightning', 'numpy', 'pandas'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
