"""Every benchmark is run by scripts/bench, and a figure says itself whether it reaches its goal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
NO_BENCHMARKS = {"figures", "run"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import figures

    return figures


def test_all_are_run() -> None:
    listed = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "--list"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert sorted(listed) == sorted({path.stem for path in BENCHMARKS.glob("*.py")} - NO_BENCHMARKS)


def test_unknown_name() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "startup", "nothing"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "there is no benchmark nothing; there are startup, " in done.stderr


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        ({"at_most": 2.0}, "met"),
        ({"at_most": 1.99}, "MISSED"),
        ({"at_least": 2.0}, "met"),
        ({"at_least": 2.01}, "MISSED"),
        ({}, ""),
    ],
)
def test_goals(figures: object, goal: dict[str, float], verdict: str) -> None:
    figure = figures.Figure.of("it", [1.0, 2.0, 9.0], unit="x", **goal)  # type: ignore[attr-defined]
    assert figure.cells()[-1] == verdict
    assert figure.met == (verdict != "MISSED")
    assert (figure.low, figure.middle, figure.high) == (1.0, 2.0, 9.0)


def test_one_measurement_has_no_spread(figures: object) -> None:
    figure = figures.Figure.of("it", [3.0], unit="s")  # type: ignore[attr-defined]
    assert figure.cells() == ["it", "3.000 s", "", "1", "", ""]


def test_finish(figures: object, capsys: pytest.CaptureFixture[str]) -> None:
    made = [
        figures.Figure.of("a", [1.0], unit="x", at_most=2.0),  # type: ignore[attr-defined]
        figures.Figure.of("b", [3.0], unit="x", at_most=2.0),  # type: ignore[attr-defined]
    ]
    assert figures.finish(made[:1], as_json=False) == 0  # type: ignore[attr-defined]
    capsys.readouterr()
    assert figures.finish(made, as_json=True) == 1  # type: ignore[attr-defined]
    printed = capsys.readouterr()
    assert [figures.Figure(**each) for each in json.loads(printed.out)] == made  # type: ignore[attr-defined]
    assert printed.err == "goal missed: b\n"
