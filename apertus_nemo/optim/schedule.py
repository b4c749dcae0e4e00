"""Learning rate, alpha and beta3 as functions of the position in a run: no state, so nothing to save or to lose.

    learning_rate(config, sample)    # WSD, linear or cosine, by sample
    alpha(config, step)              # weight of the slow average, linear
    beta3(config, step)              # decay of the slow average, linear in its half-life
    at_step(config, step)            # all of them for the 1-based step

Which sample belongs to a step: Megatron's scheduler is set to 0 samples when it is made and advances *after* each
update (`optimizer_param_scheduler.py`, `step(0)` at line 93; `megatron/training/training.py`, `train_step`), so step s
runs at the rate of the samples consumed *before* it. With a warm-up from 0, the first step therefore has a learning
rate of exactly 0: it fills the averages and moves no weight. The published runs did so, and so do we. alpha and beta3
read the step itself, counted from 1.

Formulas: Megatron-core 0.15.3 `optimizer_param_scheduler.py` l.126-186 ("WSD" with "minus_sqrt", and "linear",
which here may have a stable part before it; "cosine" is l.163, half a turn over the decay); AdEMAMix,
arXiv 2409.03137, appendix A.1, with the 1e-8 inside the logarithm that the published runs had.
Python floats (IEEE doubles) throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig


@dataclass(frozen=True)
class StepSettings:
    """What the optimizer needs to know about one step."""

    lr: float  # learning rate, before any multiplier of a parameter group
    alpha: float  # weight of the slow average
    beta3: float  # decay of the slow average


def learning_rate(config: RunConfig, sample: int) -> float:
    """Learning rate of a step before which `sample` samples were consumed."""
    peak, floor, plan = config.optim.lr, config.optim.min_lr, config.schedule
    if plan.warmup_samples > 0 and sample <= plan.warmup_samples:
        return plan.warmup_init_lr + (peak - plan.warmup_init_lr) * sample / plan.warmup_samples
    if plan.decay_samples <= 0:
        return peak
    if sample > plan.train_samples:
        return floor
    into_decay = sample - (plan.train_samples - plan.decay_samples)
    if into_decay <= 0:
        return peak
    done = into_decay / plan.decay_samples
    if plan.style == "cosine":
        return floor + 0.5 * (1.0 + cosine_of_half_turns(done)) * (peak - floor)
    return floor + (1.0 - (done if plan.style == "linear" else math.sqrt(done))) * (peak - floor)


def cosine_of_half_turns(x: float) -> float:
    """cos(pi x) for x in [0, 1], to 1e-15, by additions and multiplications: a library's differs between machines."""
    if x > 0.5:
        return -cosine_of_half_turns(1.0 - x)
    square = (math.pi * x) * (math.pi * x)
    series = 1.0
    for n in range(22, 0, -2):  # Taylor's, up to (pi / 2)^22 / 22!, about 2e-17
        series = 1.0 - series * square / (n * (n - 1))
    return series


def alpha(config: RunConfig, step: int) -> float:
    """Weight of the slow average at the 1-based step: linear from 0, then constant."""
    warmup = config.optim.alpha_warmup_steps
    return config.optim.alpha * step / warmup if step < warmup else config.optim.alpha


def beta3(config: RunConfig, step: int) -> float:
    """Decay of the slow average at the 1-based step: its half-life grows linearly from that of beta1."""
    warmup = config.optim.beta3_warmup_steps
    if step >= warmup:
        return config.optim.beta3
    done = step / warmup
    half_life = (1.0 - done) * _half_life(config.optim.beta1) + done * _half_life(config.optim.beta3)
    return math.pow(0.5, 1.0 / (half_life + 1.0))


def _half_life(beta: float) -> float:
    """Steps after which an average with this decay has forgotten half."""
    return math.log(0.5) / math.log(beta + 1e-8) - 1.0


def at_step(config: RunConfig, step: int) -> StepSettings:
    """Everything that depends on the 1-based step."""
    consumed = BatchPlan.from_config(config).consumed_samples(step - 1)
    return StepSettings(lr=learning_rate(config, consumed), alpha=alpha(config, step), beta3=beta3(config, step))
