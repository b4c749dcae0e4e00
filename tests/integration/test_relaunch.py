"""Cold runs from the command line: another folder, user, hash seed and load change no bit; another seed does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.integration.command import TRAIN, apertus, busy, shell
from tests.integration.runs import LAYOUTS, SQUEEZED, STEPS

TENSORS = 4 * 51  # weights and three optimizer states of 4 layers of 12 tensors, embedding, last norm, output layer


def train(folder: Path, name: str, overrides: tuple[str, ...], environment: dict[str, str]) -> Path:
    """A run from the command line, in `folder`; its run directory."""
    arguments = [*TRAIN, "--run-dir", name, *SQUEEZED, *overrides]
    done = apertus(arguments, folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{STEPS} steps, last loss ")
    assert "Traceback" not in done.stderr
    return folder / name


def cold_pair(layout: str, cache: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of the same recipe that share nothing but the recipe, the corpus and the code."""
    overrides = LAYOUTS[layout][1]
    first = train(tmp_path / "a", "run", overrides, shell(cache, tmp_path / "home-ann", USER="ann", LOGNAME="ann"))
    other = {
        "USER": "bob",
        "LOGNAME": "bob",
        "LANG": "de_CH.UTF-8",
        "TZ": "Asia/Tokyo",
        "PYTHONHASHSEED": "12345",
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
    }
    with busy(os.cpu_count() or 1):
        second = train(tmp_path / "b" / "deeper", "again", overrides, shell(cache, tmp_path / "home-bob", **other))
    return first, second


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "layout",
    ["one", *(pytest.param(name, marks=pytest.mark.full) for name in ("tp2", "tp2_sp", "pp2", "dp2"))],
)
@pytest.mark.usefixtures("corpus")
def test_two_cold_runs_are_identical(layout: str, cache: Path, tmp_path: Path) -> None:
    first, second = cold_pair(layout, cache, tmp_path)
    environment = shell(cache, tmp_path / "home-cat")
    done = apertus(["compare", str(first), str(second)], folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == f"identical, {STEPS} of {STEPS} steps, {TENSORS} of {TENSORS} tensors"
    assert (first / "lock.json").read_bytes() == (second / "lock.json").read_bytes()
    ranks = LAYOUTS[layout][0]
    assert len(list((first / "attempts" / "000").glob("rank-*.log"))) == ranks
    assert json.loads((first / "observed.json").read_bytes())["world_size"] == ranks


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("corpus")
def test_another_seed_is_told(cache: Path, tmp_path: Path) -> None:
    environment = shell(cache, tmp_path / "home")
    first = train(tmp_path, "first", (), environment)
    second = train(tmp_path, "second", ("trainer.seed=29",), environment)
    done = apertus(["compare", str(first), str(second)], folder=tmp_path, environment=environment)
    assert done.returncode == 1
    assert done.stdout.startswith("different: the initial state differs")
