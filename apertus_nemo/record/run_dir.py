"""The paths of a run directory, and how one is made.

    run = RunDirectory.create(folder, lock=lock, recipe_yaml=text)
    run = RunDirectory.open(folder)                 # raises InputError where it is none
    number = run.new_attempt()                      # makes attempts/001

What stands in it: docs/run-directory.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.errors import InputError
from apertus_nemo.record.files import reading, sync_folder, write_atomic, writing
from apertus_nemo.record.lock import RunLock

BESIDE = frozenset({"relaunch.json", "source.patch", "source.tar"})  # files that a run may have before its lock

_ATTEMPT = re.compile(r"[0-9]{3,6}\Z")
_STATE = re.compile(r"step-([0-9]{9})\.json\Z")


@dataclass(frozen=True)
class RunDirectory:
    """Paths; nothing here is read or made but by the methods that say so."""

    path: Path

    @classmethod
    def create(
        cls, path: Path, *, lock: RunLock, recipe_yaml: str, files: Mapping[str, bytes] | None = None
    ) -> RunDirectory:
        """Make the folder with `recipe.yaml`, `files` and, last, `lock.json`: with it, it is a run directory.

        `files` are some of BESIDE, by name: source.tar, source.patch, relaunch.json.
        Raises InputError where there is a run already, or anything else; UnfitEnvironment where the disk refuses.
        """
        run = cls(Path(path))
        with writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            names = os.listdir(run.path)
        if run.lock.name in names:
            raise InputError(f"{run.path} holds a run already: resume it, or choose another folder")
        foreign = sorted(set(names) - BESIDE - {run.recipe.name, run.steps.name, run.states.name, run.attempts.name})
        foreign = [name for name in foreign if not name.endswith(".partial") and name != run.checkpoints.name]
        if foreign:
            raise InputError(f"{run.path} is not empty (it holds {foreign[0]!r}): choose another folder for the run")
        with writing(run.path):
            for folder in (run.steps, run.states, run.attempts, run.checkpoints):
                folder.mkdir(exist_ok=True)
        for name in BESIDE & set(names) - set(files or {}):  # of a start that was interrupted before its lock
            with writing(run.path / name):
                (run.path / name).unlink()
        for name, data in (files or {}).items():
            write_atomic(run.path / name, data)
        write_atomic(run.recipe, recipe_yaml.encode())
        write_atomic(run.lock, lock.to_bytes())
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """A directory that is there; raises InputError where it is no run directory."""
        run = cls(Path(path))
        if not run.path.is_dir():
            raise InputError(f"{run.path} is not a folder")
        if not run.lock.is_file():
            raise InputError(f"{run.path} is not a run directory: it holds no {run.lock.name}")
        return run

    @property
    def lock(self) -> Path:
        """What must be the same."""
        return self.path / "lock.json"

    @property
    def source(self) -> Path:
        """Archive of the package that ran."""
        return self.path / "source.tar"

    @property
    def patch(self) -> Path:
        """What a changed checkout had over its commit."""
        return self.path / "source.patch"

    @property
    def relaunch(self) -> Path:
        """Of which run this is a relaunch, and what that one had observed."""
        return self.path / "relaunch.json"

    @property
    def observed(self) -> Path:
        """What was found on the machines at the first attempt."""
        return self.path / "observed.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe, for reading; the lock decides."""
        return self.path / "recipe.yaml"

    @property
    def steps(self) -> Path:
        """Folder of the step log."""
        return self.path / "steps"

    @property
    def states(self) -> Path:
        """Folder of the tensors' digests."""
        return self.path / "states"

    @property
    def attempts(self) -> Path:
        """Folder of the attempts."""
        return self.path / "attempts"

    @property
    def checkpoints(self) -> Path:
        """Folder of the committed checkpoints."""
        return self.path / "checkpoints"

    def state(self, step: int) -> Path:
        """File of the tensors' digests after a step (0: at the start)."""
        return self.states / f"step-{step:09d}.json"

    def state_steps(self) -> list[int]:
        """Steps that have a file in `states/`, ascending."""
        if not self.states.is_dir():
            return []
        with reading(self.states):
            return sorted(int(match[1]) for name in os.listdir(self.states) if (match := _STATE.match(name)))

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.checkpoints / f"step-{step:09d}"

    def attempt(self, number: int) -> Path:
        """Folder of an attempt, from 0."""
        return self.attempts / f"{number:03d}"

    def next_attempt(self) -> int:
        """The number after the last attempt; 0 where there was none."""
        if not self.attempts.is_dir():
            return 0
        with reading(self.attempts):
            return max((int(name) + 1 for name in os.listdir(self.attempts) if _ATTEMPT.match(name)), default=0)

    def new_attempt(self) -> int:
        """Make the folder of the next attempt, and no other process's; returns its number."""
        while True:
            number = self.next_attempt()
            with writing(self.attempt(number)):
                self.attempts.mkdir(exist_ok=True)
                try:
                    self.attempt(number).mkdir()
                except FileExistsError:
                    continue
                sync_folder(self.attempts)
            return number
