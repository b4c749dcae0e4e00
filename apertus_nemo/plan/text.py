"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def text(tree: dict[str, Any]) -> str:
    """The whole plan, a few tables."""
    return "\n".join(_lines(tree))


def _lines(tree: dict[str, Any]) -> Iterator[str]:
    gpu = tree["accelerator"]
    where = "CPU ranks" if gpu is None else f"{gpu['name']} GPUs"
    yield f"{tree['name']}: {tree['steps']:,} steps, {tree['tokens']:,} tokens, {tree['world_size']:,} {where}"
    yield ""
    several = len({row["stage"] for row in tree["pieces"]}) > 1

    def stage(text: str) -> list[str]:
        return [text] if several else []

    yield from table(
        [*stage("stage"), "steps", "samples", "batch", "tokens a step", "micro-batches", "tokens"],
        [
            [
                *stage(row["stage"]),
                f"{row['first_step']:,} to {row['last_step']:,}",
                f"{row['from_sample']:,} to {row['to_sample']:,}",
                f"{row['global_batch_size']:,}",
                f"{row['tokens_per_step']:,}",
                f"{row['micro_batches']:,} x {tree['data_parallel_size']:,}",
                f"{row['tokens']:,}",
            ]
            for row in tree["pieces"]
        ],
    )
    yield ""
    rate = tree["learning_rate"]
    yield f"learning rate  up to {rate['peak']:g} by step {rate['warmup_to_step']:,}" + (
        f", down to {rate['final']:g} from step {rate['decay_from_step']:,}" if rate["decay_from_step"] else ""
    )
    yield f"parameters     {tree['parameters']['total']:,}, a layer {tree['parameters']['layer']:,}"
    if tree["parameters"]["trained"] != tree["parameters"]["total"]:
        yield f"trained        {tree['parameters']['trained']:,}, of adapters; the others are frozen"
    flops = tree["flops"]
    yield f"FLOPs          {flops['per_token']:.4e} a token, {flops['total']:.3e} in all"
    yield from _checkpoint(tree["checkpoint"])
    yield from _cost(tree)
    level = tree["reproducibility"]
    verdict = "can be kept" if not level["against_bitwise"] else "; ".join(level["against_bitwise"])
    yield f"level          {level['level']}: bitwise {verdict}"
    yield ""
    yield "GiB on the first rank of each pipeline stage, when most is held:"
    parts = ["weights", "gradients", "optimizer", "activations", "output", "total"]
    yield from table(
        ["rank", "parameters", *parts],
        [
            [
                str(row["first_rank"]),
                f"{row['parameters']:,}",
                *(f"{row[f'{part}_bytes'] / 2**30:.2f}" for part in parts),
            ]
            for row in tree["memory"]
        ],
    )
    if gpu is not None:
        yield f"of {gpu['memory_bytes'] / 2**30:.1f} GiB; not counted: CUDA context, NCCL, workspaces, fragmentation"
    if tree.get("open"):
        yield f"a run must be told {', '.join(tree['open'])}; this plan is the same for every choice"
    yield from _built(tree.get("built", []))


def _built(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield ""
    yield "built with Megatron-core, as shapes; one layer traced forward and backward, but for the attention's kernel:"
    yield from table(
        ["rank", "stage", "parameters", "planned", "a layer keeps", "planned", ""],
        [
            [
                str(row["rank"]),
                str(row["stage"]),
                f"{row['parameters']:,}",
                f"{row['planned_parameters']:,}",
                f"{row['layer_bytes']:,} B",
                f"{row['planned_layer_bytes']:,} B",
                "equal" if row["agrees"] else "DIFFERENT",
            ]
            for row in rows
        ],
    )


def _checkpoint(row: dict[str, Any]) -> Iterator[str]:
    line = f"checkpoint     {gigabytes(row['total_bytes'])}, {gigabytes(row['weights_bytes'])} of them weights"
    if "interval_s" in row:
        line += f"; one every {row['interval_s'] / 60:.0f} min loses least"
        line += f" ({row['interval_steps']:,} steps)" if "interval_steps" in row else ""
    yield line


def _cost(tree: dict[str, Any]) -> Iterator[str]:
    row = tree["cost"]
    if row is None:
        return
    yield (
        f"time           {row['seconds'] / 86400:.1f} days at {row['tokens_per_s_per_gpu']:,.0f} tokens/s a GPU "
        f"(MFU {row['mfu']:.1%}), {row['gpu_hours']:,.0f} GPU hours, {row['energy_kwh'] / 1e6:.2f} GWh"
        if row["energy_kwh"] >= 1e5
        else f"time           {row['seconds'] / 3600:.1f} h at {row['tokens_per_s_per_gpu']:,.0f} tokens/s a GPU "
        f"(MFU {row['mfu']:.1%}), {row['gpu_hours']:,.0f} GPU hours, {row['energy_kwh']:,.0f} kWh"
    )


def gigabytes(size_bytes: int) -> str:
    """Decimal, as disks and file systems are sold: "1.27 TB", "145 GB", "36 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes / 1e6:.3g} MB"


def table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Columns that line up, numbers to the right."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    for row in [headings, *rows]:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
