"""Kills that are drawn, runs that go on after them, and what must be the same at the end.

Used by the tests and by `benchmarks/kills.py`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.audit.verify import verify
from apertus_nemo.launch.resume import last_line
from apertus_nemo.recipe.compose import compose
from apertus_nemo.record.canonical import unknown
from apertus_nemo.record.checkpoints import newest_whole
from apertus_nemo.record.lock import RunLock, Surroundings, build_lock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.step_log import StepRecord, read_steps
from apertus_nemo.testing.ranks import Parent, RankFailed
from tests.integration.runs import LAYOUTS, SQUEEZED

CLASSES: dict[str, tuple[str, ...]] = {
    "start-up": ("birth", "start"),
    "steps": ("step",),
    "log writes": ("log", "state", "seal"),
    "checkpoint writes": ("save", "checkpoint", "manifest"),
    "commits": ("note", "commit", "committed", "prune", "pruning", "end"),
}
CLASS_OF = {moment: name for name, moments in CLASSES.items() for moment in moments}

# How often each moment comes to a rank, at least: to the first one before step 9 of an attempt that begins at the
# start, and in an attempt that goes on after that. No row: it may not come.
FIRST = {"birth": 1, "start": 6, "step": 7, "log": 9, "save": 1, "state": 2, "seal": 1, "checkpoint": 8, "manifest": 1}
FIRST |= {"note": 2, "commit": 1, "committed": 1}
AGAIN = {"birth": 1, "start": 6, "step": 6, "log": 2, "save": 1, "state": 1, "seal": 2, "checkpoint": 8, "manifest": 1}
AGAIN |= {"note": 2, "commit": 1, "committed": 1, "prune": 1, "pruning": 3, "end": 1}
OTHERS = {"birth": 1, "start": 4, "step": 6, "save": 1}  # to any other rank, in both

KEEP = "trainer.keep_checkpoints=1"  # so that there is something to prune


@dataclass(frozen=True)
class Kill:
    """See tests.cases.crash."""

    moment: str
    number: int = 1
    victim: int = 0
    delay_s: float = 0.0
    all_ranks: bool = False

    def arguments(self) -> dict[str, Any]:
        """Of `killed`."""
        return {
            "moment": self.moment,
            "number": self.number,
            "victim": self.victim,
            "delay_s": self.delay_s,
            "all_ranks": self.all_ranks,
        }


def drawn(chance: random.Random, moment: str, table: Mapping[str, int], ranks: int) -> Kill:
    """A kill at a moment that `table` has: when, whom, and whether all."""
    victim = chance.randrange(ranks) if moment in OTHERS else 0
    most = table[moment] if victim == 0 else min(table[moment], OTHERS[moment])
    delay_s = chance.uniform(0.0, 0.8 if moment == "birth" else 0.1)
    return Kill(moment, 1 + chance.randrange(most), victim, delay_s, ranks > 1 and chance.random() < 0.5)


def draw(layout: str, runs: int, seed: str) -> list[list[Kill]]:
    """Two kills for each of so many runs, of every class in turn, at moments drawn from the seed."""
    chance = random.Random(f"{layout} {seed}")
    moments = {name: chance.sample(inside, len(inside)) for name, inside in CLASSES.items()}
    turn = [0] * len(CLASSES)
    names = list(CLASSES)

    def next_of(index: int, table: Mapping[str, int]) -> str:
        inside = [moment for moment in moments[names[index]] if moment in table]
        turn[index] += 1
        return inside[turn[index] % len(inside)]

    found = []
    for number in range(runs):
        first, second = number % len(names), (number // len(names) + number) % len(names)
        kills = [(first, FIRST), (second, AGAIN)]
        found.append([drawn(chance, next_of(index, table), table, LAYOUTS[layout][0]) for index, table in kills])
    return found


def begin(folder: Path, overrides: list[str]) -> RunDirectory:
    """A run directory with a lock as a start writes it, but of nothing that is slow to look at."""
    nothing = unknown("of a test")
    source = {"archive_sha256": nothing, "commit": nothing, "dirty": nothing, "files_digest": nothing}
    surroundings = Surroundings(
        packages={},
        python={},
        machine={"architecture": "", "cpu_features": [], "cpu_model": "", "driver": nothing, "gpu": nothing},
        source={**source, "package_version": "", "patch": None, "tree": nothing},
    )
    config = compose("tiny_pretrain", overrides).config
    lock = build_lock(config, overrides=overrides, environment={}, data=None, surroundings=surroundings)
    return RunDirectory.create(folder, lock=lock, recipe_yaml="name: tiny_pretrain\n")


class Survivor:
    """A run that is killed and goes on, attempt after attempt in one run directory, in forked ranks."""

    def __init__(self, parent: Parent, corpus: Path, folder: Path, layout: str, *more: str) -> None:
        self._parent, self._corpus = parent, corpus
        self._ranks, cut = LAYOUTS[layout]
        self._overrides = [*SQUEEZED, *cut, KEEP, *more]
        self.directory = begin(folder, self._overrides)
        self._lock_digest = RunLock.from_bytes(self.directory.lock.read_bytes(), what="it").digest

    def attempt(self, kill: Kill | None, *, function: str = "tests.cases.training:run_steps", **more: Any) -> list[Any]:
        """Go on from the newest whole checkpoint, to the kill or to the end; what the ranks answer at the end.

        `function` runs the steps, and gets `more`. Raises AssertionError.
        """
        directory, warnings = self.directory, list[str]()
        attempt, last = directory.new_attempt(), last_line(directory.steps)
        logged = None if last is None else int(last["step"])
        step = newest_whole(directory, lock_digest=self._lock_digest, last_logged=logged, warn=warnings.append)
        assert not warnings, f"what a kill leaves is never in checkpoints/: {warnings}"
        arguments: dict[str, Any] = {
            "folder": str(directory.path),
            "corpus": str(self._corpus),
            "overrides": self._overrides,
            "attempt": attempt,
            "checkpoint": None if step is None else str(directory.checkpoint(step)),
            "lock_digest": self._lock_digest,
            **more,
        }
        if kill is None:
            return self._parent.run(function, world_size=self._ranks, arguments=arguments)
        try:
            self._parent.run(
                "tests.cases.crash:killed", world_size=self._ranks, arguments={**arguments, **kill.arguments()}
            )
        except RankFailed as failure:
            if not str(failure).splitlines()[0].endswith("ended with status -9"):
                raise AssertionError(f"{kill}: {failure}") from failure
        else:
            raise AssertionError(f"{kill}: the moment never came")
        result = verify(directory.path)
        assert not result.findings, f"{kill}: {result.findings}"
        assert result.removed == [], f"{kill}: {result.removed}"
        return []

    def survive(self, kills: list[Kill]) -> RunDirectory:
        """One attempt for each kill, then one to the end."""
        for kill in [*kills, None]:
            self.attempt(kill)
        return self.directory


def same(directory: RunDirectory, undisturbed: RunDirectory, steps: Mapping[int, StepRecord]) -> None:
    """Every logged value of every step, every tensor where the state was digested, and a record that verifies."""
    assert {record.step: record for record in read_steps(directory.steps)} == steps
    assert directory.state_steps() == undisturbed.state_steps()
    for step in directory.state_steps():
        assert directory.state(step).read_bytes() == undisturbed.state(step).read_bytes()
    assert not list(directory.attempts.glob("*/checkpoint-step-*")), "the last commit removes what was left"
    result = verify(directory.path)
    assert (result.findings, result.finished, result.removed) == ([], True, [])
    assert result.checkpoints == [max(steps)]
    assert set(result.pruned) >= {step for step in directory.state_steps() if 0 < step < max(steps)}
