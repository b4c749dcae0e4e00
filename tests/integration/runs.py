"""Short runs of the default recipe in forked ranks, at every layout that the tests compare.

The schedule is squeezed so that all of it happens: the learning rate warms up, the batch doubles, alpha and
beta3 reach their ends, the decay begins, and a checkpoint lies in the middle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.step_log import StepRecord, read_steps
from apertus_nemo.testing.ranks import Parent

STEPS = 12
SAVED_STEP = 6  # the batch has just doubled, and the learning rate has not decayed yet

SQUEEZED = (
    "optim.lr=3e-4",  # at the recipe's, with a warm-up this short, an ulp grows to anything within ten steps
    "optim.min_lr=3e-5",
    "data.seq_length=64",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=4",
    "schedule.batch_ramp=[{from_sample:20,global_batch_size:8}]",  # from step 6 on
    "schedule.train_samples=76",  # 5 steps of 4, 7 of 8
    "schedule.warmup_samples=8",
    "schedule.decay_samples=24",
    "optim.alpha_warmup_steps=8",
    "optim.beta3_warmup_steps=8",
    f"trainer.checkpoint_every_steps={SAVED_STEP}",
)

# Fine-tuning on the embedded conversations, of that schedule.
CHAT = (
    "data=chat_embedded",
    "data.seq_length=160",
    "optim=[ademamix_sft]",
    "schedule=linear",
    "schedule.decay_samples=68",
)

# Eight layers, and as many micro-batches as PP=4 with two virtual stages wants.
DEEP = ("model.num_layers=8", "trainer.micro_batch_size=1")

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, ("parallel=tp2",)),
    "tp2_sp": (2, ("parallel=tp2_sp",)),
    "pp2": (2, ("parallel=pp2",)),
    "pp2_vpp2": (2, ("parallel=pp2_vpp2",)),
    "dp2": (2, ("parallel=dp2",)),
    "cp2": (2, ("parallel=cp2",)),
    "tp2_dp2": (4, ("parallel=tp2_dp2",)),
    "tp2_pp2": (4, ("parallel=tp2_pp2",)),
    "tp2_cp2": (4, ("parallel=tp2_cp2",)),
    "pp2_dp2": (4, ("parallel=pp2_dp2",)),
    "pp2_cp2": (4, ("parallel=pp2_cp2",)),
    "cp2_dp2": (4, ("parallel=cp2_dp2",)),
    "one_deep": (1, DEEP),
    "pp4_vpp2": (4, ("parallel=pp4_vpp2", *DEEP)),
}
SINGLE = {"one_deep": "one_deep", "pp4_vpp2": "one_deep"}  # the one process that they are held against, if not "one"
LONG = {"tp2_pp2", "tp2_cp2", "pp2_dp2", "pp2_cp2", "cp2_dp2", "one_deep", "pp4_vpp2"}  # with --full


def layouts(*, without: Iterable[str] = (), also_long: Iterable[str] = ()) -> list[Any]:
    """The layouts as parameters of a test; those that take long, and `also_long`, with --full."""
    long = LONG.union(also_long)
    names = [name for name in LAYOUTS if name not in set(without)]
    return [pytest.param(name, marks=[pytest.mark.full] if name in long else []) for name in names]


@dataclass(frozen=True)
class Run:
    """A finished run and what its ranks answered."""

    directory: RunDirectory
    ranks: list[dict[str, Any]]

    @property
    def steps(self) -> dict[int, StepRecord]:
        """The step log, by step."""
        return {record.step: record for record in read_steps(self.directory.steps)}


class Runs:
    """Makes each run once; see `tests.cases.training:run_steps` for the options."""

    def __init__(
        self, parent: Parent, corpus: Path, folder: Path, *, function: str = "tests.cases.training:run_steps"
    ) -> None:
        self._function = function
        self._parent, self._corpus, self._folder = parent, corpus, folder
        self._done: dict[Any, Run] = {}
        self._count = 0

    def __call__(
        self, layout: str, *overrides: str, again: int = 0, checkpoint: Path | None = None, **options: Any
    ) -> Run:
        """`again`: the number of a repetition, which is a run of its own."""
        key = (layout, overrides, again, checkpoint, str(sorted(options.items())))
        if key not in self._done:
            self._count += 1
            folder = self._folder / f"{self._count:03d}-{layout}"
            for name in ("steps", "states", "attempts/000", "checkpoints"):
                (folder / name).mkdir(parents=True)
            world_size, cut = LAYOUTS[layout]
            arguments = {
                "folder": str(folder),
                "corpus": str(self._corpus),
                "overrides": [*SQUEEZED, *cut, *overrides],
                "checkpoint": None if checkpoint is None else str(checkpoint),
                **options,
            }
            ranks = self._parent.run(
                self._function,
                world_size=world_size,
                arguments=arguments,
                timeout_s=150.0,
                environment={"GLOO_SOCKET_IFNAME": "lo"},
            )
            self._done[key] = Run(RunDirectory(folder), ranks)
        return self._done[key]
