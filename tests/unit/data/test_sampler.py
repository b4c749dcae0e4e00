"""The order of samples: Megatron's own for a constant batch, and nothing lost or doubled across ramps."""

from __future__ import annotations

import pytest

from apertus_nemo.data.sampler import MicroBatchSampler
from apertus_nemo.errors import InputError
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.testing.ranks import Parent

RAMP = BatchPlan(starts=(0, 24, 72), sizes=(8, 16, 32), train_samples=150)  # 3 + 3 + 2 steps, 14 samples left over


def sampler(plan: BatchPlan, rank: int, size: int, *, first_step: int = 1, micro: int = 2) -> MicroBatchSampler:
    return MicroBatchSampler(plan, first_step=first_step, micro_batch_size=micro, dp_rank=rank, dp_size=size)


def test_constant_batch_is_megatrons_order(parent: Parent) -> None:
    shapes = [(12, 3, 2, 100), (8, 1, 4, 64), (6, 6, 1, 35)]  # global batch, micro-batch, replicas, samples
    cases, ours = [], []
    for batch, micro, replicas, samples in shapes:
        for rank in range(replicas):
            for first_step in (1, 3):
                done = (first_step - 1) * batch
                plan = BatchPlan((0,), (batch,), samples)
                mine = MicroBatchSampler(
                    plan, first_step=first_step, micro_batch_size=micro, dp_rank=rank, dp_size=replicas
                )
                ours.append(list(mine))
                assert len(ours[-1]) == len(mine)
                cases.append(
                    {
                        "total_samples": samples - samples % batch,
                        "consumed_samples": done,
                        "micro_batch_size": micro,
                        "data_parallel_rank": rank,
                        "data_parallel_size": replicas,
                        "global_batch_size": batch,
                    }
                )
    [theirs] = parent.run("tests.cases.data:upstream_order", arguments={"cases": cases})
    assert ours == theirs


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_ramp_gives_each_step_its_samples_in_order(replicas: int) -> None:
    per_rank = [list(sampler(RAMP, rank, replicas)) for rank in range(replicas)]
    # Replicas side by side, micro-batch by micro-batch: the samples in their order.
    flat = [index for batches in zip(*per_rank, strict=True) for batch in batches for index in batch]
    assert flat == list(range(136))


def test_resumes_at_any_step() -> None:
    whole = list(sampler(RAMP, 1, 2))
    for step in range(1, RAMP.num_steps + 1):
        first, _ = RAMP.batch_at(step)
        rest = sampler(RAMP, 1, 2, first_step=step)
        assert list(rest) == whole[first // 4 :]
        assert len(rest) == len(list(rest))
    assert list(sampler(RAMP, 1, 2, first_step=RAMP.num_steps + 1)) == []


def test_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(InputError) as refusal:
        sampler(BatchPlan((0, 24), (8, 12), 48), 0, 4)
    assert str(refusal.value) == (
        "a global batch of 12 samples does not divide into micro-batches of 2 on 4 replicas: "
        "change trainer.global_batch_size, schedule.batch_ramp or trainer.micro_batch_size"
    )
