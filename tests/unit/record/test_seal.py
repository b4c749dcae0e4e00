"""Seals are what the log was, and a seal that was changed is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.record.seal import Seal, write_end, write_seal
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter
from tests.unit.record.example import make, step


def sealed(path: Path, *, steps: int = 5) -> Path:
    run = make(path, steps=steps)
    (run.path / "attempts" / "000").mkdir()
    (run.path / "attempts" / "000" / "environment.json").write_text("{}\n")
    (run.path / "attempts" / "000" / "rank-0.log").write_text("hello\n")
    with StepLogWriter.open(run.steps, StepLogHeader(lock_digest(run.path), "2" * 32, "0" * 64)) as log:
        write_end(run.path, attempt=0, mark=log.mark())
    return run.path


def lock_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "lock.json").read_bytes()).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_end_says_how_far_the_log_goes_and_what_else_there_is(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    end = json.loads((folder / "end.json").read_bytes())
    lines = (folder / "steps" / "000000.jsonl").read_bytes().splitlines()
    assert (end["lines"], end["last_step"], end["attempt"]) == (len(lines), 5, 0) == (7, 5, 0)
    assert (end["header"], end["last_line"]) == (sha256(lines[0]), sha256(lines[-1]))
    assert end["files"] == {
        name: sha256((folder / name).read_bytes())
        for name in ("attempts/000/environment.json", "lock.json", "recipe.yaml")
    }
    seal = Seal.from_bytes((folder / "attempts" / "000" / "seal.json").read_bytes(), what="it")
    assert seal.end == sha256((folder / "end.json").read_bytes())
    assert seal.mark == Seal.from_bytes((folder / "end.json").read_bytes(), what="it").mark


def test_a_later_attempt_marks_the_whole_log(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    (folder / "attempts" / "001").mkdir()
    with StepLogWriter.open(folder / "steps", StepLogHeader(lock_digest(folder), "2" * 32, "0" * 64)) as log:
        log.append(step(3))  # again, and equal
        log.append(step(6))
        write_seal(folder, attempt=1, mark=log.mark())
    seal = Seal.from_bytes((folder / "attempts" / "001" / "seal.json").read_bytes(), what="it")
    lines = (folder / "steps" / "000000.jsonl").read_bytes().splitlines()
    assert (seal.mark.lines, seal.mark.last_step, seal.mark.last_line) == (8, 6, sha256(lines[-1]))
    assert (seal.attempt, seal.end, seal.files) == (1, None, {})


def test_the_end_covers_the_seals_of_earlier_attempts(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    (folder / "attempts" / "001").mkdir()
    with StepLogWriter.open(folder / "steps", StepLogHeader(lock_digest(folder), "2" * 32, "0" * 64)) as log:
        write_seal(folder, attempt=1, mark=log.mark())
        write_end(folder, attempt=1, mark=log.mark())
    files = json.loads((folder / "end.json").read_bytes())["files"]
    assert files["attempts/000/seal.json"] == sha256((folder / "attempts" / "000" / "seal.json").read_bytes())
    assert "attempts/001/seal.json" not in files


@pytest.mark.parametrize(
    ("key", "value"),
    [("lines", 6), ("last_step", 4), ("header", "0" * 64), ("files", {}), ("end", "0" * 64), ("digest", "0" * 64)],
)
def test_a_changed_seal_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    tree = json.loads((sealed(tmp_path / "run") / "end.json").read_bytes())
    tree[key] = value
    data = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(InputError, match=r"^it: does not have the digest that it names"):
        Seal.from_bytes(data, what="it")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lines": 0}, "is not a seal"),
        ({"lines": True}, "is not a seal"),
        ({"attempt": -1}, "is not a seal"),
        ({"last_step": "4"}, "is not a seal"),
        ({"files": {"../lock.json": "0" * 64}}, "is not a seal"),
        ({"files": {"lock.json": "0"}}, "is not a seal"),
        ({"more": 1}, "is not a seal"),
        ({"kind": "other"}, "is not a seal"),
        ({"format": 2}, "has format 2; this version reads 1"),
    ],
)
def test_what_is_no_seal_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    tree = json.loads((sealed(tmp_path / "run") / "end.json").read_bytes())
    tree = {key: value for key, value in (tree | change).items() if key != "digest"}

    def canonical(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    tree["digest"] = sha256(canonical(tree))
    with pytest.raises(InputError) as caught:
        Seal.from_bytes(canonical(tree), what="it")
    assert str(caught.value) == f"it: {reason}"
