"""Run directories: made once, opened when they are one, attempts numbered."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.record.run_dir import RunDirectory
from tests.unit.record import example


def create(path: Path) -> RunDirectory:
    return RunDirectory.create(path, lock=example.lock(), recipe_yaml="name: tiny\n")


def test_a_new_one(tmp_path: Path) -> None:
    run = create(tmp_path / "runs" / "a")
    assert sorted(os.listdir(run.path)) == ["attempts", "checkpoints", "lock.json", "recipe.yaml", "states", "steps"]
    assert run.lock.read_bytes() == example.lock().to_bytes()
    assert run.recipe.read_text() == "name: tiny\n"
    assert RunDirectory.open(run.path) == run
    assert run.state(12) == run.path / "states" / "step-000000012.json"
    assert run.checkpoint(12) == run.path / "checkpoints" / "step-000000012"
    assert run.attempt(3) == run.path / "attempts" / "003"


def test_a_run_is_not_made_over_another(tmp_path: Path) -> None:
    create(tmp_path / "a")
    with pytest.raises(InputError, match="holds a run already: resume it, or choose another folder"):
        create(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"is not empty \(it holds 'thesis.tex'\)"):
        create(tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["thesis.tex"]


def test_one_that_was_interrupted_while_it_was_made_is_completed(tmp_path: Path) -> None:
    run = create(tmp_path / "a")
    run.lock.unlink()
    (run.path / ".lock.json.1-ab.partial").touch()
    assert create(tmp_path / "a") == run


def test_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} is not a run directory: it holds no lock.json"):
        RunDirectory.open(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        RunDirectory.open(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UnfitEnvironment, match="could not write"):
        create(tmp_path / "file" / "run")


def test_attempts_are_numbered_and_nobody_shares_one(tmp_path: Path) -> None:
    run = create(tmp_path / "a")
    assert run.next_attempt() == 0
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(run.new_attempt())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))
    (run.attempts / "notes").mkdir()
    (run.attempts / "1000").mkdir()
    assert run.next_attempt() == 1001


def test_states_are_listed(tmp_path: Path) -> None:
    run = create(tmp_path / "a")
    for name in ("step-000000010.json", "step-000000000.json", ".step-000000005.json.1-ab.partial", "other"):
        (run.states / name).touch()
    assert run.state_steps() == [0, 10]
