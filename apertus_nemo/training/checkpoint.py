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
from apertus_nemo.record.checkpoints import MANIFEST, MANIFEST_VERSION
from apertus_nemo.record.files import sync_folder, tree_manifest, write_atomic, writing
from apertus_nemo.record.run_dir import RunDirectory


def save_checkpoint(trainer: pl.Trainer, directory: RunDirectory, *, attempt: int, step: int, lock_digest: str) -> Path:
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
        files = tree_manifest(partial)
        manifest = {"files": files, "lock_digest": lock_digest, "step": step, "version": MANIFEST_VERSION}
        write_atomic(partial / MANIFEST, dumps(manifest))
        with writing(final):
            _commit(partial, final)
        _clear(directory)
    torch.distributed.barrier()
    return final


def _commit(partial: Path, final: Path) -> None:
    """Rename into place; what lies there (a torn checkpoint that was passed over) goes once the new one is there."""
    final.parent.mkdir(parents=True, exist_ok=True)
    replaced = partial.with_name(f"{partial.name[: -len('.partial')]}.replaced.partial")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    sync_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _clear(directory: RunDirectory) -> None:
    """Remove what attempts that were killed have left of checkpoints, now that there is a good one."""
    for left in directory.attempts.glob("*/checkpoint-step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
