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

from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.files import tree_manifest, write_atomic
from apertus_nemo.record.run_dir import RunDirectory


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
        write_atomic(partial / "manifest.json", dumps({"version": 1, "step": step, "files": tree_manifest(partial)}))
        if final.exists():
            shutil.rmtree(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.rename(partial, final)
    torch.distributed.barrier()
    return final
