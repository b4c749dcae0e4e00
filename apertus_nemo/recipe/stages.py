"""Data stages: which data belong to which sample, across changes of the mixture, the seed and the sequence length.

    stage_at(config, sample).name       # light: a recipe or a lock's `config` is all that it needs
    plan = StagePlan.from_config(config)
    plan.at(sample)                     # the Stage of a global sample
    plan.consumed_tokens(samples)       # tokens in the first `samples` samples, whatever their lengths

A recipe without stages is one stage of all of its data. Samples are numbered as in `batches.py`; a stage begins
between two steps (`check` refuses anything else), so all samples of a step have one length.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from apertus_nemo.recipe.schema import DataStage, MixturePart, RunConfig

ONLY = "all"  # name of the one stage of a recipe without stages
EMBEDDED_SOURCES = ("documentation", "library")


@dataclass(frozen=True)
class Stage:
    """One stage, with everything that it takes from the rest of the recipe."""

    number: int  # from 1
    name: str
    from_sample: int
    to_sample: int  # one past the last
    seed: int
    seq_length: int  # tokens a sample
    position: str  # "restart" or "continue"
    mixture: tuple[MixturePart, ...]  # empty: all of the data

    @property
    def num_samples(self) -> int:
        """Samples of the stage."""
        return self.to_sample - self.from_sample

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of its sources; "" is all of the data."""
        return tuple(part.source for part in self.mixture) or ("",)


@dataclass(frozen=True)
class StagePlan:
    """The stages of a run, in order; they tile the samples from 0 to train_samples."""

    stages: tuple[Stage, ...]

    @classmethod
    def from_config(cls, config: RunConfig) -> StagePlan:
        """The plan of a resolved recipe that has passed `check`."""
        data = config.data
        given = data.stages or (DataStage(name=ONLY, from_sample=0),)
        ends = (*(stage.from_sample for stage in given[1:]), config.schedule.train_samples)
        return cls(
            tuple(
                Stage(
                    number=number,
                    name=stage.name,
                    from_sample=stage.from_sample,
                    to_sample=end,
                    seed=data.seed if stage.seed is None else stage.seed,
                    seq_length=data.seq_length if stage.seq_length is None else stage.seq_length,
                    position=stage.position,
                    mixture=stage.mixture,
                )
                for number, (stage, end) in enumerate(zip(given, ends, strict=True), start=1)
            )
        )

    def at(self, sample: int) -> Stage:
        """The stage that a sample belongs to; the last one for samples past the end."""
        starts = [stage.from_sample for stage in self.stages]
        return self.stages[max(0, bisect.bisect_right(starts, sample) - 1)]

    def consumed_tokens(self, samples: int) -> int:
        """Tokens in the first `samples` samples of the run; each sample counts with its stage's length."""
        ends = (min(stage.to_sample, samples) for stage in self.stages)
        return sum(max(0, end - s.from_sample) * s.seq_length for s, end in zip(self.stages, ends, strict=True))

    @property
    def max_seq_length(self) -> int:
        """The longest sample of the run."""
        return max(stage.seq_length for stage in self.stages)


def stage_at(config: RunConfig, sample: int) -> Stage:
    """The stage that a global sample of a run belongs to."""
    return StagePlan.from_config(config).at(sample)


def has_corpora(config: RunConfig) -> bool:
    """data.path is the folder of several built corpora, one for each source of a mixture."""
    return config.data.source == "built" and any(stage.mixture for stage in config.data.stages)
