"""What a rank does: from the lock in the run directory to the last step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch

from apertus_nemo.data.manifest import verify
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.record.lock import RunLock, lock_digest
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.step_log import StepLogWriter
from apertus_nemo.training.assemble import DataModel, build_trainer, prepare_process
from apertus_nemo.training.observe import observe
from apertus_nemo.training.progress import Progress
from apertus_nemo.training.recorder import Recorder


def train_rank(folder: Path, *, attempt: int, environment: Mapping[str, str], progress: Progress) -> None:
    """Train as the rank that `environment` names, in the run directory `folder`."""
    directory = RunDirectory(folder)
    lock = RunLock.load(directory.lock_path)
    rank, local_rank = int(environment["RANK"]), int(environment["LOCAL_RANK"])
    corpus = Path(environment["APERTUS_CORPUS"])
    rendezvous = environment.get("APERTUS_RENDEZVOUS")
    if rank == 0:
        verify(corpus)
        progress.send("phase", text="building the model")
    train(
        lock.run_config(),
        directory,
        lock=lock,
        attempt=attempt,
        rank=rank,
        local_rank=local_rank,
        corpus=corpus,
        rendezvous=None if rendezvous is None else Path(rendezvous),
        progress=progress if rank == 0 else Progress(None),
    )


def train(
    run: RunConfig,
    directory: RunDirectory,
    *,
    lock: RunLock,
    attempt: int,
    rank: int,
    local_rank: int,
    corpus: Path,
    rendezvous: Path | None,
    progress: Progress,
    checkpoint: Path | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
) -> pl.Trainer:
    """Train to the end; collective over the ranks of the run."""
    prepare_process(run)
    log = None
    if rank == 0:
        observed = observe(run)
        directory.write_observed(observed)
        log = StepLogWriter.open(directory.steps, lock_digest=lock_digest(lock), observation=observed)
    recorder = Recorder(run, directory, attempt=attempt, log=log, progress=progress)
    model = DataModel(run, corpus, corpus / "index-cache")
    trainer = build_trainer(
        run, rank=rank, local_rank=local_rank, rendezvous=rendezvous, callbacks=[recorder, *callbacks]
    )
    trainer.fit(model, ckpt_path=None if checkpoint is None else str(checkpoint))
    if log is not None:
        log.sync()
        log.close()
    torch.distributed.barrier()
    return trainer
