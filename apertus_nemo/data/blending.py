"""Which source a sample of a stage comes from, and which sample of that source it is: Megatron's own blending.

    blend = Blend.build(stage, weights)          # or Blend.load(stage, folder), from what blend.save(folder) wrote
    blend[sample]                                # (number of the source in the stage's mixture, number in the source)
    offsets, needed = positions(plan, [blend.counts for ...])

`build_blending_indices` of megatron-core (`core/datasets/helpers.cpp`) gives sample i to the source that is furthest
behind weight * i: it walks the samples once, in C++, when the index is made. Afterwards each sample is looked up in
files that are mapped into memory (10 bytes a sample). A stage of one source needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.recipe.stages import Stage, StagePlan


@dataclass(frozen=True)
class Blend:
    """The blend of one stage."""

    counts: tuple[int, ...]  # samples from each source
    source: Any = None  # int16 [samples]; None: there is one source
    number: Any = None  # int64 [samples]

    @classmethod
    def build(cls, stage: Stage, weights: Sequence[float]) -> Blend:
        """By weights (in the order of the stage's sources, need not sum to 1)."""
        if len(weights) == 1:
            return cls((stage.num_samples,))
        import numpy as np
        from megatron.core.datasets import helpers
        from megatron.core.datasets.utils import normalize

        source = np.zeros(stage.num_samples, dtype=np.int16)
        number = np.zeros(stage.num_samples, dtype=np.int64)
        shares = np.array(normalize(list(weights)), dtype=np.float64)
        helpers.build_blending_indices(source, number, shares, len(weights), stage.num_samples, False)
        return cls(_counts(source, len(weights)), source, number)

    def save(self, stage: Stage, folder: Path) -> None:
        """Into two files of `folder`; none for one source."""
        if self.source is not None:
            import numpy as np

            for path, values in zip(_paths(stage, folder), (self.source, self.number), strict=True):
                np.save(path, values, allow_pickle=False)

    @classmethod
    def load(cls, stage: Stage, folder: Path) -> Blend:
        """What `save` wrote, mapped into memory."""
        if len(stage.sources) == 1:
            return cls((stage.num_samples,))
        import numpy as np

        source, number = (np.load(path, mmap_mode="r", allow_pickle=False) for path in _paths(stage, folder))
        return cls(_counts(source, len(stage.sources)), source, number)

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """(number of the source, number in the source) of the stage's sample, from 0."""
        return (0, sample) if self.source is None else (int(self.source[sample]), int(self.number[sample]))


def _counts(source: Any, sources: int) -> tuple[int, ...]:
    import numpy as np

    return tuple(int(count) for count in np.bincount(source, minlength=sources))


def _paths(stage: Stage, folder: Path) -> tuple[Path, Path]:
    return folder / f"stage-{stage.number:03d}-source.npy", folder / f"stage-{stage.number:03d}-number.npy"


Order = tuple[int, str]  # one order of a source's samples: (number of the stage that began it, source)


def positions(
    plan: StagePlan, counts: Sequence[Sequence[int]]
) -> tuple[list[list[tuple[Order, int]]], dict[Order, int]]:
    """Where in its source each stage begins, and how many samples each order must have.

    The first answer holds, for each stage and each of its sources, the order and the first position in it. Stages
    that say "continue" read on in the order of the stages before, back to the last one that says "restart".
    """
    begun = 0
    used: dict[Order, int] = {}
    places = []
    for stage, drawn in zip(plan.stages, counts, strict=True):
        if stage.position != "continue":
            begun = stage.number
        row = []
        for name, count in zip(stage.sources, drawn, strict=True):
            order = (begun, name)
            row.append((order, used.get(order, 0)))
            used[order] = used.get(order, 0) + count
        places.append(row)
    return places, used
