"""Checkpoints: written through NeMo's strategy into a folder of the attempt, committed by one rename, pruned by policy.

A checkpoint is `checkpoints/step-<n>/`: Megatron's torch_dist files under `weights/`, and `manifest.json` with
the SHA-256 of every file. A folder without the manifest is never taken for a checkpoint. What goes by policy is noted
in `checkpoints.json`, then renamed away, then removed: killed in the middle, nothing is left that is taken for whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import torch

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.schema import TrainerConfig
from apertus_nemo.record.canonical import dumps, sha256_hex
from apertus_nemo.record.checkpoint_list import CheckpointList, Made, read_list, to_prune, write_list
from apertus_nemo.record.checkpoints import MANIFEST, MANIFEST_VERSION, committed_steps, manifest_of
from apertus_nemo.record.files import sync_folder, tree_manifest, write_atomic, writing, writing_for_others
from apertus_nemo.record.run_dir import RunDirectory


def save_checkpoint(
    trainer: pl.Trainer,
    directory: RunDirectory,
    *,
    attempt: int,
    step: int,
    lock_digest: str,
    policy: TrainerConfig | None = None,
) -> Path:
    """Save weights, optimizer and loops of `step`; collective. Returns the committed folder.

    Then, and not before, what `policy` does not keep is removed; without one, all are kept.
    """
    partial = directory.attempt(attempt) / f"checkpoint-step-{step:09d}.partial"
    final = directory.checkpoint(step)
    rank = torch.distributed.get_rank()
    if rank == 0 and partial.exists():
        shutil.rmtree(partial)
    torch.distributed.barrier()
    state = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    with writing_for_others(partial):
        trainer.strategy.save_checkpoint(state, partial)
    torch.distributed.barrier()
    if rank == 0:
        files = tree_manifest(partial)
        manifest = dumps({"files": files, "lock_digest": lock_digest, "step": step, "version": MANIFEST_VERSION})
        write_atomic(partial / MANIFEST, manifest)
        made = Made(step, sha256_hex(manifest), attempt)
        listed = read_list(directory.path)
        write_list(directory.path, listed.begun(made))
        with writing(final):
            _commit(partial, final)
        prune(directory, listed.committed(made), attempt=attempt, newest=step, policy=policy)
        _clear(directory)
    torch.distributed.barrier()
    return final


def prune(
    directory: RunDirectory, listed: CheckpointList, *, attempt: int, newest: int, policy: TrainerConfig | None
) -> None:
    """Note in the list what `policy` removes, and remove it; `newest` is the step of a checkpoint that was committed.

    Later ones than that, which were passed over, stay, and so does what is not in the list.
    """
    there = [step for step in listed.made if step <= newest and directory.checkpoint(step).exists()]
    gone = () if policy is None else to_prune(there, keep=policy.keep_checkpoints, every=policy.keep_every_steps)
    write_list(directory.path, listed.pruned(gone))
    for step in gone:
        folder = directory.checkpoint(step)
        away = directory.attempt(attempt) / f"checkpoint-step-{step:09d}.pruned.partial"
        with writing(folder):
            os.rename(folder, away)
            sync_folder(directory.checkpoints)
        shutil.rmtree(away, ignore_errors=True)  # what is left of it goes at the next commit


def take_stock(directory: RunDirectory, *, lock_digest: str) -> None:
    """At the start of an attempt, before anything is written: bring `checkpoints.json` up to what was committed.

    A crash between the commit of a checkpoint and its note, and runs that were begun before there was a list, leave
    checkpoints that it does not name. What killed attempts have left of checkpoints is removed.
    """
    _clear(directory)
    old = read_list(directory.path)
    listed = CheckpointList(old.made)
    for step in committed_steps(directory):
        try:
            digest, tree = manifest_of(directory.checkpoint(step))
        except InputError:
            continue  # torn; it stays until the run has made it anew
        if tree["step"] != step or tree.get("lock_digest", lock_digest) != lock_digest:
            continue
        if old.pending is not None and (old.pending.step, old.pending.manifest) == (step, digest):
            listed = listed.committed(old.pending)
        elif step not in listed.made:
            listed = listed.committed(Made(step, digest, None))
    if listed != old:
        write_list(directory.path, listed)


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
    """Remove what attempts that were killed have left of checkpoints: it is whole nowhere, and takes space."""
    for left in directory.attempts.glob("*/checkpoint-step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
