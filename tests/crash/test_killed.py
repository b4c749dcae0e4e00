"""A run that is killed (SIGKILL) at any moment goes on and ends as the one that nobody touched, to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from apertus_nemo.launch.resume import last_line
from apertus_nemo.record.checkpoints import newest_whole
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.step_log import read_steps
from apertus_nemo.testing.ranks import Parent, RankFailed
from tests.integration.runs import LAYOUTS, SAVED_STEP, SQUEEZED, STEPS, Run

LOCK_DIGEST = "0" * 64  # of runs in forked ranks


@dataclass(frozen=True)
class Kill:
    """See tests.cases.crash."""

    moment: str
    number: int
    victim: int = 0
    delay_s: float = 0.0


# How often each moment comes, at least, in an attempt of one rank that does all steps. On resuming there are fewer.
TIMES = {
    "step": STEPS,
    "log": STEPS + 2,  # header, initial state, steps
    "state": 3,
    "checkpoint": 8,
    "manifest": 2,
    "commit": 2,
    "committed": 2,
    "start": 6,
}


def draw(layout: str, count: int, seed: str) -> list[Kill]:
    """Kills of every class, in an order and at moments drawn from the seed."""
    chance = random.Random(f"{layout} {seed}")
    moments = list(TIMES) * (count // len(TIMES) + 1)
    ranks = LAYOUTS[layout][0]
    kills = []
    for moment in moments[:count]:
        victim = chance.randrange(ranks) if moment == "step" else 0
        kills.append(Kill(moment, 1 + chance.randrange(TIMES[moment]), victim, chance.uniform(0.0, 0.1)))
    return kills


def goes_on(parent: Parent, corpus: Path, folder: Path, layout: str, kills: list[Kill]) -> RunDirectory:
    """Attempt after attempt in one run directory, each with its kill and the last one with none."""
    directory = RunDirectory(folder)
    for path in (directory.steps, directory.states, directory.checkpoints):
        path.mkdir(parents=True)
    ranks, cut = LAYOUTS[layout]
    for kill in [*kills, None]:
        attempt = directory.new_attempt()
        last = last_line(directory.steps)
        step = newest_whole(
            directory,
            lock_digest=LOCK_DIGEST,
            last_logged=None if last is None else int(last["step"]),
            warn=lambda text: pytest.fail(text),  # what a kill leaves is never in checkpoints/
        )
        arguments = {
            "folder": str(folder),
            "corpus": str(corpus),
            "overrides": [*SQUEEZED, *cut],
            "attempt": attempt,
            "checkpoint": None if step is None else str(directory.checkpoint(step)),
        }
        if kill is None:
            parent.run("tests.cases.training:run_steps", world_size=ranks, arguments=arguments)
        else:
            with pytest.raises(RankFailed, match=r"rank \d+ .*(killed|signal|-9)"):
                parent.run("tests.cases.crash:killed", world_size=ranks, arguments={**arguments, **asdict(kill)})
    return directory


def same(directory: RunDirectory, undisturbed: Run) -> None:
    """Every logged value of every step, and every tensor where the state was digested."""
    assert {record.step: record for record in read_steps(directory.steps)} == undisturbed.steps
    assert directory.state_steps() == undisturbed.directory.state_steps()
    for step in directory.state_steps():
        assert directory.state(step).read_bytes() == undisturbed.directory.state(step).read_bytes()
    assert not list(directory.attempts.glob("*/*.partial")), "the last commit removes what was left"


@pytest.mark.parametrize("moment", TIMES)
def test_killed_once(runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path, moment: str) -> None:
    (kill,) = (kill for kill in draw("one", len(TIMES), "once") if kill.moment == moment)
    same(goes_on(parent, corpus, tmp_path / "run", "one", [kill]), runs("one"))


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([Kill("log", 1), Kill("log", 2), Kill("state", 1), Kill("start", 2)], id="before the first step"),
        pytest.param([Kill("step", 9, 0, 0.01), Kill("log", 1), Kill("step", 2)], id="three times"),
        pytest.param([Kill("committed", 2)], id="after the last checkpoint and before the end"),
    ],
)
def test_killed_again(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path, kills: list[Kill]
) -> None:
    directory = goes_on(parent, corpus, tmp_path / "run", "one", kills)
    same(directory, runs("one"))
    assert (directory.path / "end.json").is_file()


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_killed_among_others(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path, layout: str
) -> None:
    kills = [Kill("step", SAVED_STEP + 2, victim=1, delay_s=0.02)]
    same(goes_on(parent, corpus, tmp_path / "run", layout, kills), runs(layout))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "seed"), [("one", 0), ("one", 1), ("tp2", 0), ("dp2", 0)])
def test_killed_at_drawn_moments(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path, layout: str, seed: int
) -> None:
    for number, kill in enumerate(draw(layout, len(TIMES), str(seed))):
        same(goes_on(parent, corpus, tmp_path / f"run-{number}", layout, [kill]), runs(layout))
