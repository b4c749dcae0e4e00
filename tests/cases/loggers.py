"""Ranks that draw curves: what the charts write, and what they do when they cannot."""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from apertus_nemo.recipe.compose import compose
from apertus_nemo.record.run_dir import RunDirectory


def tensorboard(rank: int, world_size: int, *, folder: str, torn: int, attempts: list[list[int]]) -> None:
    """Attempts as [number, first step, last step], each killed but for the last; `torn`: bytes that the kill cost."""
    from apertus_nemo.training.loggers import TensorBoard

    for number, first, last in attempts:
        board = TensorBoard(Path(folder), attempt=number, first_step=first, clock=lambda: 1000.0)
        for step in range(first, last + 1):
            board.write(step, {"loss": 1.0 / step, "attempt": float(number)})
        if number != attempts[-1][0]:
            path = Path(folder) / f"events.out.tfevents.{number:010d}"
            os.truncate(path, path.stat().st_size - torn)  # what is there although nothing was closed
        else:
            board.close()


def charts(
    rank: int,
    world_size: int,
    *,
    folder: str,
    overrides: list[str],
    first_step: int,
    last_step: int,
    largest_file_bytes: int | None = None,
    without: str | None = None,
) -> dict[str, Any]:
    """Steps of a run as the trainer would report them, with loss 8 / step and gradient norm 1 / step.

    largest_file_bytes: the disk is full from there on. without: a module that is not installed.
    """
    from apertus_nemo.training.loggers import Charts

    os.environ["HOME"] = folder
    if without is not None:
        sys.modules[without] = None  # type: ignore[assignment]
    if largest_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, resource.RLIM_INFINITY))
    run = compose("tiny_pretrain", overrides).config
    warnings: list[str] = []
    drawn = Charts(run, RunDirectory(Path(folder)), attempt=0, run_id="ab" * 16, warn=warnings.append)
    trainer: Any = SimpleNamespace(global_step=first_step - 1)
    module: Any = SimpleNamespace(values={})
    drawn.on_train_start(trainer, module)
    seconds = []
    for step in range(first_step, last_step + 1):
        trainer.global_step = step - 1
        drawn.on_train_batch_start(trainer, module)
        module.values.update(reduced_train_loss=8.0 / step, grad_norm=1.0 / step, unknown=object())
        trainer.global_step = step
        start = time.perf_counter()
        drawn.on_train_batch_end(trainer, module)
        seconds.append(time.perf_counter() - start)
    drawn.on_train_end(trainer, module)
    return {
        "warnings": warnings,
        "median": sorted(seconds)[len(seconds) // 2],
        "wandb": "wandb" in sys.modules and sys.modules["wandb"] is not None,
    }


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format (doc/log_format.md there), which begins with seven bytes of W&B's."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # a header never crosses a block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def stored_by_wandb(rank: int, world_size: int, *, folder: str) -> dict[str, Any]:
    """What the offline file of Weights & Biases holds: run, configuration and history."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    [path] = Path(folder).glob("logs/wandb/*/*.wandb")
    found: dict[str, Any] = {"history": []}
    for data in _leveldb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = [record.run.run_id, record.run.project, record.run.display_name]
            found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if kind == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found["history"].append({key: value for key, value in items.items() if not key.startswith("_")})
            found["history"][-1]["step"] = record.history.step.num
    return found
