"""The plan of a run: one tree of plain values, from the recipe alone.

    tree = plan(run, Assumptions(tokens_per_s_per_gpu=723.0))
    tree["parameters"]["total"], tree["pieces"][1]["first_step"], tree["refused"]

Nothing is built and nothing heavy is imported. All sizes in bytes, all times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apertus_nemo.model.layout import layer_parameter_count, parameter_count
from apertus_nemo.plan.cost import checkpoint_bytes, checkpoint_interval_s, cost, throughput_at, trained_parameter_count
from apertus_nemo.plan.flops import run_flops
from apertus_nemo.plan.hardware import Accelerator, accelerator
from apertus_nemo.plan.memory import Memory, rank_memory
from apertus_nemo.plan.ranks import rank_parameters, rank_trained_parameters
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.check import NOT_BITWISE
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan

_ROOM = 0.90  # of the GPU's memory; what is not counted needs the rest


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say."""

    accelerator: str = "gh200"
    tokens_per_s_per_gpu: float | None = None
    mfu: float | None = None  # instead of a throughput
    checkpoint_s: float | None = None  # how long a checkpoint holds the run up
    mean_time_between_failures_s: float | None = None


def plan(run: RunConfig, assumptions: Assumptions) -> dict[str, Any]:
    """Everything; `refused` holds one line for each thing that cannot work. InputError for a wrong assumption."""
    gpu = accelerator(assumptions.accelerator) if run.trainer.accelerator == "gpu" else None
    batches = BatchPlan.from_config(run)
    steps = min(batches.num_steps, run.trainer.max_steps or batches.num_steps)
    samples = batches.consumed_samples(steps)
    tokens, flops = StagePlan.from_config(run).consumed_tokens(samples), run_flops(run, samples)
    weights, states = checkpoint_bytes(run)
    memory = _memory(run, batches)
    tree: dict[str, Any] = {
        "name": run.name,
        "world_size": run.world_size,
        "data_parallel_size": run.data_parallel_size,
        "steps": steps,
        "samples": samples,
        "tokens": tokens,
        "pieces": _pieces(run, batches, steps),
        "learning_rate": _learning_rate(run, batches),
        "parameters": {
            "total": parameter_count(run.model),
            "trained": trained_parameter_count(run),
            "layer": layer_parameter_count(run.model),
            "by_stage": [row["parameters"] for row in memory],
        },
        "memory": memory,
        "flops": {"per_token": flops // tokens, "total": flops},
        "checkpoint": {"weights_bytes": weights, "optimizer_bytes": states, "total_bytes": weights + states},
        "reproducibility": _reproducibility(run),
        "accelerator": None if gpu is None else vars(gpu),
        "refused": [] if gpu is None else _too_large(memory, gpu),
        "cost": None,
    }
    throughput = assumptions.tokens_per_s_per_gpu
    if throughput is None and assumptions.mfu is not None and gpu is not None:
        throughput = throughput_at(run, gpu, assumptions.mfu)
    if throughput is not None and gpu is not None:
        tree["cost"] = vars(cost(run, tokens, tree["flops"]["total"], gpu, throughput))
    if assumptions.checkpoint_s is not None and assumptions.mean_time_between_failures_s is not None:
        interval = checkpoint_interval_s(assumptions.checkpoint_s, assumptions.mean_time_between_failures_s)
        tree["checkpoint"]["interval_s"] = interval
        if throughput is not None and gpu is not None:
            step_s = tree["pieces"][-1]["tokens_per_step"] / (throughput * run.world_size)
            tree["checkpoint"]["interval_steps"] = max(1, round(interval / step_s))
    return tree


def _pieces(run: RunConfig, batches: BatchPlan, steps: int) -> list[dict[str, Any]]:
    """What stays the same from one sample to another: batch geometry and data."""
    rows, step = [], 0
    stages = StagePlan.from_config(run)
    starts = sorted({*batches.starts, *(stage.from_sample for stage in stages.stages)})
    share = run.trainer.micro_batch_size * run.data_parallel_size
    for start, end in zip(starts, (*starts[1:], batches.train_samples), strict=True):
        stage, size = stages.at(start), batches.size_at(start)
        count = min((end - start) // size, steps - step)
        if count <= 0:
            break
        rows.append(
            {
                "from_sample": start,
                "to_sample": start + count * size,
                "first_step": step + 1,
                "last_step": step + count,
                "global_batch_size": size,
                "stage": stage.name,
                "tokens_per_step": size * stage.seq_length,
                "micro_batches": size // share,
                "tokens": count * size * stage.seq_length,
            }
        )
        step += count
    return rows


def _learning_rate(run: RunConfig, batches: BatchPlan) -> dict[str, Any]:
    """Where warm-up ends and decay begins: sample, and the step that reads it."""
    schedule = run.schedule
    decay = schedule.train_samples - schedule.decay_samples
    return {
        "peak": run.optim.lr,
        "final": run.optim.min_lr,
        "warmup_to_sample": schedule.warmup_samples,
        "warmup_to_step": step_at(batches, schedule.warmup_samples),
        "decay_from_sample": decay if schedule.decay_samples else None,
        "decay_from_step": step_at(batches, decay) if schedule.decay_samples else None,
    }


def step_at(batches: BatchPlan, sample: int) -> int:
    """Steps that are done before the first one that reads a sample at or after `sample`."""
    steps = 0
    ends = (*batches.starts[1:], batches.train_samples)
    for start, size, end in zip(batches.starts, batches.sizes, ends, strict=True):
        if sample <= end:
            return steps + -(-max(0, sample - start) // size)
        steps += (end - start) // size
    return steps


def _memory(run: RunConfig, batches: BatchPlan) -> list[dict[str, Any]]:
    """One row a pipeline stage, of its first rank: within a stage all ranks hold the same."""
    stages = run.parallel.pipeline_model_parallel_size
    share = run.trainer.micro_batch_size * run.data_parallel_size
    micro_batches = max(batches.sizes) // share
    rows = []
    for stage in range(stages):
        rank = stage * (run.world_size // stages)
        held: Memory = rank_memory(run, rank, micro_batches=micro_batches, recompute=run.parallel.recompute)
        rows.append(
            {
                "stage": stage,
                "first_rank": rank,
                "parameters": rank_parameters(run, rank).total,
                "trained_parameters": rank_trained_parameters(run, rank),
                **{f"{name}_bytes": value for name, value in vars(held).items()},
                "total_bytes": held.total,
            }
        )
    return rows


def _too_large(memory: list[dict[str, Any]], gpu: Accelerator) -> list[str]:
    worst = max(memory, key=lambda row: int(row["total_bytes"]))
    if worst["total_bytes"] <= gpu.memory_bytes * _ROOM:
        return []
    room = gpu.memory_bytes * _ROOM
    line = (
        f"rank {worst['first_rank']} needs {worst['total_bytes'] / 2**30:.1f} GiB, and {_ROOM:.0%} of a {gpu.name} is "
        f"{room / 2**30:.1f} GiB: cut the model further (parallel.*), shorten the samples, lower "
        "trainer.micro_batch_size, or set parallel.recompute=full"
    )
    return [line]


def _reproducibility(run: RunConfig) -> dict[str, Any]:
    """The level, and every setting with which it could not be kept."""
    against = [row.reason for row in NOT_BITWISE if row.applies(run)]
    return {"level": run.reproducibility.level, "against_bitwise": against}
