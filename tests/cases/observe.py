"""Taking the observation of an attempt, with a machine that a test makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def attempts(rank: int, world_size: int, *, folder: str, machines: list[dict[str, Any]]) -> list[Any]:
    """One attempt after the other in the run directory `folder`; of each, what it gave or what it raised.

    A machine is what differs from this one.
    """
    from apertus_nemo.errors import UnfitEnvironment
    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.record.run_dir import RunDirectory
    from apertus_nemo.training import observe

    run = compose("tiny_pretrain").config
    real = observe.observe(run)
    answers: list[Any] = []
    for number, machine in enumerate(machines):
        directory = RunDirectory(Path(folder))
        directory.attempt(number).mkdir(parents=True)
        observe.observe = lambda _, machine=machine: {**real, **machine}  # type: ignore[misc]
        try:
            answers.append(observe.take_observation(run, directory, attempt=number).decode())
        except UnfitEnvironment as error:
            answers.append(str(error).splitlines())
    return answers
