"""What stages must be to each other: one failing example for each rule and branch, word for word, and one that passes."""
# ruff: noqa: E501  (messages are held word for word)

from __future__ import annotations

import copy
from typing import Any

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.recipe import stage_rules
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.check import check, find
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan
from apertus_nemo.recipe.typed import from_tree
from tests.unit.recipe.test_typed import TINY

DOCUMENTATION, LIBRARY = {"source": "documentation"}, {"source": "library"}
Stage = dict[str, Any]


def a(**more: Any) -> Stage:
    return {"name": "a", "from_sample": 0, **more}


def b(first: int = 320, **more: Any) -> Stage:
    return {"name": "b", "from_sample": first, "seed": 5, **more}


def configured(stages: list[Stage], **changes: Any) -> RunConfig:
    """640 samples: 40 steps of 8, then 20 of 16; samples of 64 tokens."""
    tree = copy.deepcopy(TINY)
    tree["data"] |= {"seq_length": 64, "stages": stages}
    tree["model"]["max_position_embeddings"] = 256
    tree["schedule"] |= {"train_samples": 640, "batch_ramp": [{"from_sample": 320, "global_batch_size": 16}]}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return from_tree(tree)


BUILT = {"data__source": "built", "data__path": "/d"}
SP2 = {
    "parallel__tensor_model_parallel_size": 2,
    "parallel__sequence_parallel": True,
    "trainer__devices": 2,
    "data__goldfish": False,
}

# (stages and changes that fail, the message, stages and changes that pass beside it)
CASES: list[tuple[list[Stage], dict[str, Any], str, list[Stage], dict[str, Any]]] = [
    (
        [a(from_sample=8)],
        {},
        "data.stages.0.from_sample=8: the samples before it belong to no stage; let the first stage begin with sample 0",
        [a()],
        {},
    ),
    (
        [a(), b(320), {"name": "c", "from_sample": 320, "seed": 6}],
        {},
        "data.stages.2.from_sample=320: the stage before it begins with sample 320; put the stages in order, each beginning after the one before",
        [a(), b(320), {"name": "c", "from_sample": 336, "seed": 6}],
        {},
    ),
    (
        [a(), b(320), {"name": "c", "from_sample": 8, "seed": 6}],
        {},
        "data.stages.2.from_sample=8: the stage before it begins with sample 320; put the stages in order, each beginning after the one before",
        [a(), b(8), {"name": "c", "from_sample": 320, "seed": 6}],
        {},
    ),
    (
        [a(), b(640)],
        {},
        "data.stages.1.from_sample=640, schedule.train_samples=640: the run is over by then; begin the stage earlier, or leave it out",
        [a(), b(624)],
        {},
    ),
    (
        [a(), b(317)],
        {},
        "data.stages.1.from_sample=317: sample 317 lies inside a batch of 8; change the stage between two batches, for example at sample 320",
        [a(), b(312)],
        {},
    ),
    (
        [a(), b(328)],
        {},
        "data.stages.1.from_sample=328: sample 328 lies inside a batch of 16; change the stage between two batches, for example at sample 336",
        [a(), b(336)],
        {},
    ),
    (
        [a(), b(name="a")],
        {},
        "data.stages.1.name=a, data.stages.0.name=a: two stages have one name; give each stage a name of its own",
        [a(), b()],
        {},
    ),
    (
        [a(mixture=[{"source": "web"}]), b()],
        BUILT,
        "data.stages.1.name=b, data.path=/d: other stages have mixtures, so data.path is a folder of several corpora, of which this stage names none; give every stage a mixture, or none",
        [a(), b()],
        BUILT,
    ),
    (
        [a(mixture=[LIBRARY, DOCUMENTATION, LIBRARY])],
        {},
        "data.stages.0.mixture.2.source=library, data.stages.0.mixture.0.source=library: the mixture has this source twice; name it once, with the sum of the weights",
        [a(mixture=[LIBRARY, DOCUMENTATION])],
        {},
    ),
    (
        [a(mixture=[{"source": "web"}])],
        {},
        "data.stages.0.mixture.0.source=web, data.source=embedded: the text that comes with Python has the sources documentation and library; name one of them, or choose data=built",
        [a(mixture=[{"source": "web"}])],
        BUILT,
    ),
    (
        [a(mixture=[{**LIBRARY, "weight": 0.5}, DOCUMENTATION])],
        {},
        "data.stages.0.mixture.1.weight=null: other sources of the mixture have weights; give all of them a weight, or none (then the samples that each has count)",
        [a(mixture=[{**LIBRARY, "weight": 0.5}, {**DOCUMENTATION, "weight": 3}])],
        {},
    ),
    (
        [a(position="continue")],
        {},
        "data.stages.0.position=continue: there is no stage before the first one; write restart, or leave it out",
        [a()],
        {},
    ),
    (
        [a(), b(position="continue")],
        {},
        "data.stages.1.position=continue: seed and length order and cut the samples, and seed is 5 here and 28 before; set data.stages.1.seed=28, or data.stages.1.position=restart",
        [a(), b(position="continue", seed=28)],
        {},
    ),
    (
        [a(), b(position="continue", seed=28, seq_length=128)],
        {},
        "data.stages.1.position=continue: seed and length order and cut the samples, and seq_length is 128 here and 64 before; set data.stages.1.seq_length=64, or data.stages.1.position=restart",
        [a(seq_length=128), b(position="continue", seed=28, seq_length=128)],
        {},
    ),
    (
        [a(mixture=[LIBRARY]), b(seed=None, mixture=[DOCUMENTATION, LIBRARY])],
        {},
        "data.stages.1.seed=null, data.stages.0.seed=null, data.stages.1.position=restart: the source library would be read in the same order again, from its start; choose a seed of its own, or data.stages.1.position=continue after the stage before",
        [a(mixture=[LIBRARY]), b(seed=None, mixture=[DOCUMENTATION])],
        {},
    ),
    (
        [a(), b(seed=28)],
        {},
        "data.stages.1.seed=28, data.stages.0.seed=null, data.stages.1.position=restart: the data would be read in the same order again, from its start; choose a seed of its own, or data.stages.1.position=continue after the stage before",
        [a(seed=27), b(seed=28)],
        {},
    ),
    (
        [a(), b(seq_length=512)],
        {},
        "data.stages.1.seq_length=512, model.max_position_embeddings=256: samples are longer than the longest sequence that the model announces; shorten the samples, or raise model.max_position_embeddings",
        [a(), b(seq_length=256)],
        {},
    ),
    (
        [a(), b(seq_length=32)],
        {},
        "data.stages.1.seq_length=32, data.goldfish_h=50: the hash sees more labels than a sample has, so no label would ever be dropped; make goldfish_h at most the sequence length, or set data.goldfish=false",
        [a(), b(seq_length=32)],
        {"data__goldfish": False},
    ),
    (
        [a(), b(seq_length=33)],
        SP2,
        "data.stages.1.seq_length=33, parallel.tensor_model_parallel_size=2: sequence parallelism cannot share the positions evenly by these ranks; choose a sequence length that is a multiple of it",
        [a(), b(seq_length=34)],
        SP2,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_rule(case: tuple[list[Stage], dict[str, Any], str, list[Stage], dict[str, Any]]) -> None:
    bad, changes, message, good, others = case
    with pytest.raises(InputError) as error:
        check(configured(bad, **changes))
    assert str(error.value) == message
    check(configured(good, **others))


def test_context_parallelism_cuts_every_length() -> None:
    stages = [a(seq_length=64), b(seq_length=66)]
    config = configured(stages, parallel__context_parallel_size=2, trainer__devices=2)
    found = [finding.line(config) for finding in find(config) if finding.keys[0].startswith("data.stages")]
    assert found == [
        "data.stages.1.seq_length=66, parallel.context_parallel_size=2: context parallelism cuts a sample into 4 equal chunks; choose a sequence length that is a multiple of 4"
    ]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (b(mixture=[{**LIBRARY, "weight": weight}]), f"data.stages.1.mixture.0.weight is {shown}; it must be a number above 0 ")
        for weight, shown in ((0, "0"), (-1.0, "-1.0"), (float("nan"), "nan"), (float("inf"), "inf"), (1e300, "1e+300"))
    ]
    + [
        (b(mixture=[{"source": source}]), f'data.stages.1.mixture.0.source is "{source}"; it must be text')
        for source in ("../x", "/etc", "a//b", "a/", "a/../b", ".x", "a b", "")
    ]
    + [
        (b(name="a/b"), 'data.stages.1.name is "a/b"; it must be text: it names a stage'),
        (b(seed=-1), "data.stages.1.seed is -1; "),
        (b(seed="???"), "data.stages.1.seed has no value; "),
        (b(seq_length=1), "data.stages.1.seq_length is 1; "),
        (b(position="rewind"), 'data.stages.1.position is "rewind"; it must be "restart" or "continue"'),
        (b(mixtures=[]), "data.stages.1.mixtures is not a key of a recipe; did you mean data.stages.mixture.source?"),
        (b(mixture=[{"weight": 1.0}]), "data.stages.1.mixture.0.source has no value; "),
        ({"name": "b"}, "data.stages.1.from_sample has no value; "),
    ],
)  # fmt: skip
def test_a_value_that_is_wrong_by_itself(stage: Stage, message: str) -> None:
    with pytest.raises(InputError) as error:
        configured([a(), stage])
    assert str(error.value).startswith(message)


def test_a_ramp_in_disorder_is_reported_once() -> None:
    ramp = [{"from_sample": 320, "global_batch_size": 16}, {"from_sample": 320, "global_batch_size": 32}]
    assert [f.keys[0] for f in find(configured([a(), b(8)], schedule__batch_ramp=ramp))] == [
        "schedule.batch_ramp.1.from_sample"
    ]


def test_a_stage_passes_where_the_batch_plan_has_a_boundary_and_only_there() -> None:
    """Against batch geometry: every first sample of a step may begin a stage, and no other sample."""
    plan = BatchPlan.from_config(configured([]))
    firsts = {plan.batch_at(step)[0] for step in range(1, plan.num_steps + 1)}
    for sample in range(1, 640):
        config = configured([a(), b(sample)])
        assert (not find(config)) == (sample in firsts), sample
        if sample in firsts:
            assert plan.batch_at(plan.steps_before(sample) + 1)[0] == sample
            assert StagePlan.from_config(config).at(sample).name == "b"


def test_no_stages_no_faults() -> None:
    assert list(stage_rules.faults(configured([]))) == []
