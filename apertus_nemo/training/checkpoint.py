"""Checkpoints: written through NeMo's strategy into a folder of the attempt, committed by one rename.

A checkpoint is `checkpoints/step-<n>/`: Megatron's torch_dist files under `weights/`, and `manifest.json` with
the SHA-256 of every file. A folder without the manifest is never taken for a checkpoint.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import torch

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps, loads_canonical
from apertus_nemo.record.files import read_bytes, tree_manifest, write_atomic
from apertus_nemo.record.run_dir import RunDirectory

_MANIFEST = "manifest.json"
_MANIFEST_VERSION = 1
_MAX_MANIFEST_BYTES = 64 * 1024 * 1024  # a line a file: ranks times writers


def checkpoint_step(folder: Path) -> int:
    """The step whose end a committed checkpoint holds. Raises InputError where `folder` is not one."""
    path = folder / _MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it holds no {_MANIFEST}; give a folder of checkpoints/")
    tree = loads_canonical(read_bytes(path, max_bytes=_MAX_MANIFEST_BYTES), what=str(path))
    if not isinstance(tree, dict) or tree.get("version") != _MANIFEST_VERSION or type(tree.get("step")) is not int:
        raise InputError(f"{path} is not the manifest of a checkpoint of version {_MANIFEST_VERSION}")
    step: int = tree["step"]
    return step


def save_checkpoint(trainer: pl.Trainer, directory: RunDirectory, *, attempt: int, step: int) -> Path:
    """Save weights, optimizer and loops of `step`; collective. Returns the committed folder."""
    partial = directory.attempt(attempt) / f"checkpoint-step-{step:09d}.partial"
    final = directory.checkpoint(step)
    rank = torch.distributed.get_rank()
    if rank == 0 and partial.exists():
        shutil.rmtree(partial)
    torch.distributed.barrier()
    state = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    trainer.strategy.save_checkpoint(state, partial)
    torch.distributed.barrier()
    if rank == 0:
        manifest = {"version": _MANIFEST_VERSION, "step": step, "files": tree_manifest(partial)}
        write_atomic(partial / _MANIFEST, dumps(manifest))
        if final.exists():
            shutil.rmtree(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.rename(partial, final)
    torch.distributed.barrier()
    return final
