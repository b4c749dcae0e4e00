"""Checkpoints that somebody removes, and starts that meet: one line, nothing lost, the same end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from apertus_nemo.audit.verify import verify
from apertus_nemo.launch.resume import claimed, look_at, read_lock
from apertus_nemo.recipe.typed import from_tree
from apertus_nemo.testing.ranks import Parent
from tests.crash.kills import Kill, Survivor, same
from tests.integration.command import TRAIN, apertus, shell
from tests.integration.runs import SAVED_STEP, SQUEEZED, Run


def test_a_checkpoint_that_was_removed(runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path) -> None:
    """The run says so, goes on from an older one, here from the start, and does the steps again."""
    survivor = Survivor(parent, corpus, tmp_path / "run", "one")
    directory = survivor.directory
    survivor.attempt(Kill("step", SAVED_STEP + 2))
    folder = directory.checkpoint(SAVED_STEP)
    shutil.rmtree(folder)
    assert verify(directory.path).removed == [SAVED_STEP]
    lock, warnings = read_lock(directory), list[str]()
    state = look_at(directory, lock, from_tree(lock.tree["config"]), warn=warnings.append)
    assert (state.step, state.finished) == (None, False)
    assert warnings == [f"{folder} was removed, and not by the run; passed over"]
    survivor.attempt(None)
    undisturbed = runs("one")
    same(directory, undisturbed.directory, undisturbed.steps)


def test_what_the_run_has_pruned_is_not_missed(parent: Parent, corpus: Path, tmp_path: Path) -> None:
    survivor = Survivor(parent, corpus, tmp_path / "run", "one")
    survivor.attempt(Kill("end"))
    lock, warnings = read_lock(survivor.directory), list[str]()
    state = look_at(survivor.directory, lock, from_tree(lock.tree["config"]), warn=warnings.append)
    assert (state.step, warnings) == (2 * SAVED_STEP, [])


def test_two_starts_at_once(cache: Path, corpus: Path, tmp_path: Path) -> None:
    """The first has the folder before there is anything in it. While the first trains: test_start_again.py."""
    environment = shell(cache, tmp_path / "home")
    with claimed(tmp_path / "run"):
        arguments = [*TRAIN, "--quiet", "--run-dir", "run", *SQUEEZED]
        done = apertus(arguments, folder=tmp_path, environment=environment)
        assert list((tmp_path / "run").iterdir()) == []
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "apertus-nemo: run: another process is training in this run directory; wait for it, or end it\n"
    )
