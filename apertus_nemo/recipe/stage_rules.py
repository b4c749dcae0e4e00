"""What the stages of `data.stages` must be to each other and to the rest of a recipe; `check.py` reports it.

    for keys, reason, remedy in faults(config): ...

Each rule yields (dotted keys, the one to change first; reason; remedy) of what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import EMBEDDED_SOURCES, Stage, StagePlan

Fault = tuple[tuple[str, ...], str, str]

TP, CP = "parallel.tensor_model_parallel_size", "parallel.context_parallel_size"


def faults(c: RunConfig) -> Iterator[Fault]:
    """Everything that is wrong with the stages of a recipe; nothing where it has none."""
    if c.data.stages:
        for rule in (_order, _batches, _names, _mixtures, _orders_of_samples, _lengths):
            yield from rule(c)


def _order(c: RunConfig) -> Iterator[Fault]:
    """Stages tile the samples of the run."""
    stages, end = c.data.stages, c.schedule.train_samples
    if stages[0].from_sample != 0:
        yield (
            ("data.stages.0.from_sample",),
            "the samples before it belong to no stage",
            "let the first stage begin with sample 0",
        )
    for i, (before, stage) in enumerate(zip(stages, stages[1:], strict=False), start=1):  # noqa: RUF007
        key = f"data.stages.{i}.from_sample"
        if stage.from_sample <= before.from_sample:
            reason = f"the stage before it begins with sample {before.from_sample}"
            yield (key,), reason, "put the stages in order, each beginning after the one before"
        elif stage.from_sample >= end:
            yield (
                (key, "schedule.train_samples"),
                "the run is over by then",
                "begin the stage earlier, or leave it out",
            )


def _batches(c: RunConfig) -> Iterator[Fault]:
    """All samples of a step belong to one stage."""
    plan = BatchPlan.from_config(c)
    pieces = list(zip(plan.starts, plan.sizes, strict=True))
    if list(plan.starts) != sorted(set(plan.starts)):
        return  # the ramp itself is reported
    for i, stage in enumerate(c.data.stages):
        start, size = next((piece for piece in reversed(pieces) if piece[0] <= stage.from_sample), pieces[0])
        if (stage.from_sample - start) % size:
            fits = start + max(1, round((stage.from_sample - start) / size)) * size
            yield (
                (f"data.stages.{i}.from_sample",),
                f"sample {stage.from_sample} lies inside a batch of {size}",
                f"change the stage between two batches, for example at sample {fits}",
            )


def _names(c: RunConfig) -> Iterator[Fault]:
    """A name says which stage is meant."""
    names = [stage.name for stage in c.data.stages]
    for i, name in enumerate(names):
        if name in names[:i]:
            first = f"data.stages.{names.index(name)}.name"
            yield (f"data.stages.{i}.name", first), "two stages have one name", "give each stage a name of its own"


def _mixtures(c: RunConfig) -> Iterator[Fault]:
    """The parts of a mixture are different, are there, and are weighed in one way."""
    mixed = [bool(stage.mixture) for stage in c.data.stages]
    if c.data.source == "built" and any(mixed) and not all(mixed):
        yield (
            (f"data.stages.{mixed.index(False)}.name", "data.path"),
            "other stages have mixtures, so data.path is a folder of several corpora, of which this stage names none",
            "give every stage a mixture, or none",
        )
    for i, stage in enumerate(c.data.stages):
        sources = [part.source for part in stage.mixture]
        for j, part in enumerate(stage.mixture):
            key = f"data.stages.{i}.mixture.{j}"
            if part.source in sources[:j]:
                yield (
                    (f"{key}.source", f"data.stages.{i}.mixture.{sources.index(part.source)}.source"),
                    "the mixture has this source twice",
                    "name it once, with the sum of the weights",
                )
            if c.data.source == "embedded" and part.source not in EMBEDDED_SOURCES:
                yield (
                    (f"{key}.source", "data.source"),
                    f"the text that comes with Python has the sources {' and '.join(EMBEDDED_SOURCES)}",
                    "name one of them, or choose data=built",
                )
        weighed = [part.weight is not None for part in stage.mixture]
        if any(weighed) and not all(weighed):
            yield (
                (f"data.stages.{i}.mixture.{weighed.index(False)}.weight",),
                "other sources of the mixture have weights",
                "give all of them a weight, or none (then the samples that each has count)",
            )


def _orders_of_samples(c: RunConfig) -> Iterator[Fault]:
    """No stage reads, without being told to, what an earlier one has read in the same order."""
    stages = StagePlan.from_config(c).stages
    for i, stage in enumerate(stages):
        key = f"data.stages.{i}"
        if stage.position == "continue":
            if i == 0:
                yield (f"{key}.position",), "there is no stage before the first one", "write restart, or leave it out"
                continue
            for name in ("seed", "seq_length"):
                mine, its = getattr(stage, name), getattr(stages[i - 1], name)
                if mine != its:
                    yield (
                        (f"{key}.position",),
                        f"seed and length order and cut the samples, and {name} is {mine} here and {its} before",
                        f"set {key}.{name}={its}, or {key}.position=restart",
                    )
            continue
        for earlier in stages[:i]:
            shared = sorted({*stage.sources} & {*earlier.sources})
            if shared and stage.seed == earlier.seed:
                what = f"the source {shared[0]}" if shared[0] else "the data"
                yield (
                    (f"{key}.seed", f"data.stages.{earlier.number - 1}.seed", f"{key}.position"),
                    f"{what} would be read in the same order again, from its start",
                    f"choose a seed of its own, or {key}.position=continue after the stage before",
                )
                break


def _lengths(c: RunConfig) -> Iterator[Fault]:
    """What holds for data.seq_length holds for a stage's own."""
    limits: list[tuple[str, Callable[[Stage], bool], str, str]] = [
        (
            "model.max_position_embeddings",
            lambda s: s.seq_length > c.model.max_position_embeddings,
            "samples are longer than the longest sequence that the model announces",
            "shorten the samples, or raise model.max_position_embeddings",
        ),
        (
            "data.goldfish_h",
            lambda s: c.data.goldfish and c.data.goldfish_h > s.seq_length,
            "the hash sees more labels than a sample has, so no label would ever be dropped",
            "make goldfish_h at most the sequence length, or set data.goldfish=false",
        ),
        (
            TP,
            lambda s: c.parallel.sequence_parallel and s.seq_length % c.parallel.tensor_model_parallel_size > 0,
            "sequence parallelism cannot share the positions evenly by these ranks",
            "choose a sequence length that is a multiple of it",
        ),
        (
            CP,
            lambda s: (
                c.parallel.context_parallel_size > 1 and s.seq_length % (2 * c.parallel.context_parallel_size) > 0
            ),
            f"context parallelism cuts a sample into {2 * c.parallel.context_parallel_size} equal chunks",
            f"choose a sequence length that is a multiple of {2 * c.parallel.context_parallel_size}",
        ),
    ]
    for stage, given in zip(StagePlan.from_config(c).stages, c.data.stages, strict=True):
        if given.seq_length is not None:  # else the rules of data.seq_length say it
            for key, applies, reason, remedy in limits:
                if applies(stage):
                    yield (f"data.stages.{stage.number - 1}.seq_length", key), reason, remedy
