"""A run that is killed (SIGKILL) at any moment goes on and ends as the one that nobody touched, to the bit.

One rank is killed, or all of them at once; the launcher too in test_start_again.py. After each kill the record
verifies, as far as it goes, and so it does at the end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.testing.ranks import Parent
from tests.crash.kills import AGAIN, CLASS_OF, CLASSES, FIRST, Kill, Survivor, draw, drawn, same
from tests.integration.runs import SAVED_STEP, Run

DRAWN = 10  # runs of each layout in the full tier, two kills each


def survives(
    runs: Callable[..., Run], parent: Parent, corpus: Path, folder: Path, layout: str, kills: list[Kill]
) -> None:
    directory = Survivor(parent, corpus, folder, layout).survive(kills)
    undisturbed = runs(layout)
    same(directory, undisturbed.directory, undisturbed.steps)


def chosen(first: str, second: str) -> list[Kill]:
    """These moments, of one rank that is alone; when exactly is drawn."""
    chance = random.Random(f"{first} {second}")
    return [drawn(chance, first, FIRST, 1), drawn(chance, second, AGAIN, 1)]


PAIRS = [
    ("state", "step"),
    ("commit", "log"),
    ("manifest", "checkpoint"),
    ("seal", "note"),
    ("committed", "pruning"),
    ("birth", "prune"),
    ("save", "end"),
]


def test_every_moment_is_met() -> None:
    assert {moment for pair in PAIRS for moment in pair} == CLASS_OF.keys() - {"start"}  # that comes below
    for layout in ("one", "tp2", "dp2"):
        kills = [kill for run in draw(layout, DRAWN, "0") for kill in run]
        counts = Counter(CLASS_OF[kill.moment] for kill in kills)
        assert len(kills) >= 20
        assert counts.keys() == CLASSES.keys()
        assert min(counts.values()) >= 3
        assert layout == "one" or {kill.all_ranks for kill in kills} == {True, False}
        assert layout == "one" or {kill.victim for kill in kills} == {0, 1}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_killed_twice(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path, first: str, second: str
) -> None:
    survives(runs, parent, corpus, tmp_path / "run", "one", chosen(first, second))


def test_killed_again_and_again_before_the_first_step(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path
) -> None:
    kills = [Kill("log", 1), Kill("log", 2), Kill("state", 1), Kill("start", 2)]
    survives(runs, parent, corpus, tmp_path / "run", "one", kills)


@pytest.mark.parametrize(
    "layout", ["tp2", "dp2", *(pytest.param(name, marks=pytest.mark.full) for name in ("pp2_vpp2", "cp2"))]
)
def test_killed_among_others(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path, layout: str
) -> None:
    early = Kill("birth", victim=1)  # before the process group forms, while the others wait for it
    kills = [early, Kill("step", SAVED_STEP + 2, victim=1, delay_s=0.02), Kill("save", 1, victim=1, all_ranks=True)]
    survives(runs, parent, corpus, tmp_path / "run", layout, kills)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("layout", ["one", "tp2", "dp2"])
def test_killed_at_drawn_moments(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path, layout: str, part: int
) -> None:
    half = DRAWN // 2
    for number, kills in enumerate(draw(layout, DRAWN, "0")[part * half : (part + 1) * half]):
        survives(runs, parent, corpus, tmp_path / f"run-{number}", layout, kills)
