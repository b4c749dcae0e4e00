"""Schedules against the published runs' test values and against Megatron's own scheduler."""

from __future__ import annotations

import dataclasses
import math

import pytest

from apertus_nemo.optim.schedule import alpha, at_step, beta3, cosine_of_half_turns, learning_rate
from apertus_nemo.recipe.schema import (
    BatchRampStep,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
)

TRAIN, WARMUP, DECAY = 3_662_109_375, 4_096_000, 403_905_806


def published(peak: float = 1.1e-4) -> RunConfig:
    """The 8B run's schedule; the 70B run's is the same with a peak of 1e-5 and twice the batch."""
    return RunConfig(
        name="published",
        model=ModelConfig(32, 4096, 21504, 32, 8, 128, 131072),
        data=DataConfig(),
        optim=OptimConfig(lr=peak, min_lr=peak / 10),
        schedule=ScheduleConfig(
            train_samples=TRAIN,
            warmup_samples=WARMUP,
            decay_samples=DECAY,
            batch_ramp=(BatchRampStep(1_718_272_000, 2048),),
        ),
        parallel=ParallelConfig(),
        trainer=TrainerConfig(global_batch_size=1024, micro_batch_size=1),
    )


@pytest.mark.parametrize(
    ("step", "value"),
    [(1, 0.9009883), (100, 0.9499662), (1000, 0.9909010), (10_000, 0.9990090), (50_000, 0.9998002)],
)
def test_beta3_of_the_published_runs(step: int, value: float) -> None:
    assert beta3(published(), step) == pytest.approx(value, abs=5e-8)


def test_beta3_after_its_warmup() -> None:
    assert beta3(published(), 100_000) == 0.9999
    assert beta3(published(), 2_000_000) == 0.9999


@pytest.mark.parametrize(("step", "value"), [(1, 8e-5), (1000, 0.08), (50_000, 4.0), (100_000, 8.0), (200_000, 8.0)])
def test_alpha_of_the_published_runs(step: int, value: float) -> None:
    assert alpha(published(), step) == pytest.approx(value, rel=1e-15)


def test_no_warmup_is_the_end_value_at_once() -> None:
    run = published()
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, alpha_warmup_steps=0, beta3_warmup_steps=0))
    assert (alpha(run, 1), beta3(run, 1)) == (8.0, 0.9999)


@pytest.mark.parametrize(
    ("sample", "value", "digits"),
    [
        (0, 0.0, 0.0),
        (2_048_000, 5.5e-5, 1e-15),
        (WARMUP, 1.1e-4, 1e-15),
        (1_000_000_000, 1.1e-4, 0.0),
        (TRAIN - DECAY, 1.1e-4, 0.0),
        (TRAIN - DECAY + DECAY // 100, 1.0010e-4, 1e-6),
        (TRAIN - DECAY + DECAY // 4, 6.05e-5, 1e-6),
        (TRAIN - DECAY + DECAY // 2, 3.99964e-5, 1e-6),
        (TRAIN, 1.1e-5, 1e-15),
        (TRAIN + 1, 1.1e-5, 1e-15),
    ],
)
def test_learning_rate_of_the_published_runs(sample: int, value: float, digits: float) -> None:
    assert learning_rate(published(), sample) == pytest.approx(value, rel=digits, abs=0.0)
    assert learning_rate(published(1e-5), sample) == pytest.approx(value / 11, rel=max(digits, 1e-15), abs=0.0)


def test_cosine() -> None:
    """Half a turn over the decay, from the peak to the floor, against the library's cosine."""
    assert [cosine_of_half_turns(x) for x in (0.0, 0.5, 1.0)] == [1.0, pytest.approx(0.0, abs=1e-16), -1.0]
    for n in range(1001):
        assert cosine_of_half_turns(n / 1000) == pytest.approx(math.cos(math.pi * n / 1000), abs=1e-15)
    run = published()
    run = dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, style="cosine", batch_ramp=()))
    assert learning_rate(run, TRAIN - DECAY) == 1.1e-4
    assert learning_rate(run, TRAIN - DECAY // 2) == pytest.approx((1.1e-4 + 1.1e-5) / 2, rel=1e-9)
    assert learning_rate(run, TRAIN) == pytest.approx(1.1e-5, rel=1e-12)


def test_learning_rate_from_a_warmup_that_starts_above_zero() -> None:
    run = published()
    run = dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, warmup_init_lr=1.1e-5))
    assert learning_rate(run, 0) == 1.1e-5
    assert learning_rate(run, WARMUP // 2) == pytest.approx(6.05e-5, rel=1e-14)


def test_no_decay_is_constant_to_the_end() -> None:
    run = published()
    run = dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, decay_samples=0))
    assert learning_rate(run, TRAIN) == 1.1e-4


def test_a_step_runs_at_the_rate_of_the_samples_before_it() -> None:
    run = published()
    assert at_step(run, 1).lr == 0.0
    assert at_step(run, 2).lr == learning_rate(run, 1024)
    first_of_large_batches = 1_718_272_000 // 1024 + 1
    assert first_of_large_batches == 1_678_001
    assert at_step(run, first_of_large_batches + 1).lr == learning_rate(run, 1_718_272_000 + 2048)
    assert at_step(run, 2_429_921).lr < 1.1e-4
    assert at_step(run, 2_429_920).lr == 1.1e-4


@pytest.mark.parametrize("decay_samples", [0, 16_000])
def test_the_same_as_a_step_by_step_scheduler(decay_samples: int) -> None:
    """Megatron's scheduler, written as the loop that it is: starts at 0, advances after each step."""
    run = published()
    schedule = ScheduleConfig(40_000, 5_000, decay_samples, 1e-6, batch_ramp=(BatchRampStep(10_240, 2048),))
    run = dataclasses.replace(run, schedule=schedule)
    consumed, step = 0, 0
    while consumed + (size := 1024 if consumed < 10_240 else 2048) <= 40_000:
        step += 1
        if consumed <= 5_000:
            expected = 1e-6 + (1.1e-4 - 1e-6) * (consumed / 5_000)
        elif consumed <= 40_000 - decay_samples:
            expected = 1.1e-4
        else:
            expected = 1.1e-5 + (1 - math.sqrt((consumed - 40_000 + decay_samples) / decay_samples)) * (1.1e-4 - 1.1e-5)
        assert at_step(run, step).lr == pytest.approx(expected, rel=1e-14)
        consumed += size
    assert step == 24


def test_the_linear_decay_is_that_of_transformers() -> None:
    """`get_linear_schedule_with_warmup` counts steps: k / warm-up, then (total - k) / (total - warm-up)."""
    schedule = ScheduleConfig(512 * 1000, 512 * 30, 512 * 970, style="linear")
    run = dataclasses.replace(published(), schedule=schedule)
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=5e-6, min_lr=0.0))
    run = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, global_batch_size=512))
    for step in (1, 2, 30, 31, 32, 500, 999, 1000):
        k = step - 1
        expected = 5e-6 * (k / 30 if k <= 30 else (1000 - k) / 970)
        assert at_step(run, step).lr == pytest.approx(expected, rel=1e-12)
    assert learning_rate(run, 512 * 1000) == 0.0
