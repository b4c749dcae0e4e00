"""A run that stops for its time limit saves, on all ranks after the same step, and goes on to the same end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.audit.verify import verify
from apertus_nemo.testing.ranks import Parent
from tests.crash.kills import Survivor, same
from tests.integration.runs import Run


@pytest.mark.parametrize(
    ("layout", "limits_s"),
    [("one", [0.0]), ("tp2", [None, 0.0]), pytest.param("dp2", [3600.0, 0.0], marks=pytest.mark.full)],
)
def test_the_limit_of_one_rank_stops_all(
    runs: Callable[..., Run],
    parent: Parent,
    corpus: Path,
    tmp_path: Path,
    layout: str,
    limits_s: list[float | None],
) -> None:
    """Each start does one step at least; one that has more time does them all."""
    survivor = Survivor(parent, corpus, tmp_path / "run", layout)
    for step in (1, 2):
        assert [answer["step"] for answer in survivor.attempt(None, limits_s=limits_s)] == [step] * len(limits_s)
        result = verify(tmp_path / "run")
        assert (result.findings, result.last_step, result.checkpoints) == ([], step, [step])  # keep_checkpoints=1
    survivor.attempt(None, limits_s=[3600.0] * len(limits_s))
    undisturbed = runs(layout)
    same(survivor.directory, undisturbed.directory, undisturbed.steps)
