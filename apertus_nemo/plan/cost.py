"""Time, energy, checkpoints: what follows from a throughput that the user knows or assumes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apertus_nemo.errors import InputError
from apertus_nemo.model.adapter_layout import adapter_parameter_count
from apertus_nemo.model.layout import parameter_count
from apertus_nemo.plan.flops import run_flops
from apertus_nemo.plan.hardware import Accelerator
from apertus_nemo.plan.memory import element_bytes, optimizer_bytes_per_parameter
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan


@dataclass(frozen=True)
class Cost:
    """Of a whole run at one throughput."""

    tokens_per_s_per_gpu: float
    seconds: float
    gpu_hours: float
    energy_kwh: float  # of the GPUs alone
    mfu: float  # model FLOPs utilisation: of the GPU's peak


def cost(run: RunConfig, tokens: int, flops: int, gpu: Accelerator, tokens_per_s_per_gpu: float) -> Cost:
    """What so many tokens cost on all ranks of the run; the throughput in tokens a second and GPU."""
    if not (math.isfinite(tokens_per_s_per_gpu) and tokens_per_s_per_gpu > 0):
        raise InputError(f"a throughput is a positive number of tokens a second, and {tokens_per_s_per_gpu} is not")
    seconds = tokens / (tokens_per_s_per_gpu * run.world_size)
    gpu_hours = seconds * run.world_size / 3600
    return Cost(
        tokens_per_s_per_gpu=tokens_per_s_per_gpu,
        seconds=seconds,
        gpu_hours=gpu_hours,
        energy_kwh=gpu_hours * gpu.power_w / 1000,
        mfu=flops / tokens * tokens_per_s_per_gpu / gpu.peak_flops,
    )


def throughput_at(run: RunConfig, gpu: Accelerator, mfu: float) -> float:
    """Tokens a second and GPU at a share of the GPU's peak, of all samples of the run."""
    if not 0 < mfu <= 1:
        raise InputError(f"a utilisation is above 0 and at most 1, and {mfu} is not")
    samples = run.schedule.train_samples
    return mfu * gpu.peak_flops * StagePlan.from_config(run).consumed_tokens(samples) / run_flops(run, samples)


def checkpoint_bytes(run: RunConfig) -> tuple[int, int]:
    """(weights, optimizer states) in a checkpoint: every logical tensor once; of adapters alone if there are any."""
    parameters = trained_parameter_count(run)
    return parameters * element_bytes(run), parameters * optimizer_bytes_per_parameter(run)


def trained_parameter_count(run: RunConfig) -> int:
    """Parameters that are trained, of all ranks together."""
    return parameter_count(run.model) if run.adapter.kind == "none" else adapter_parameter_count(run.model, run.adapter)


def checkpoint_interval_s(save_s: float, mean_time_between_failures_s: float) -> float:
    """Seconds between checkpoints that lose the least time: sqrt(2 T_save T_fail).

    J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (9), 1974; J. T. Daly (2006)
    refines it where saving is not short against failing.
    """
    for what, value in (("saving", save_s), ("the mean time between failures", mean_time_between_failures_s)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{what} takes a positive time, and {value} s is not one")
    return math.sqrt(2 * save_s * mean_time_between_failures_s)
