"""What a rank does: from the lock in the run directory to the last step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

from apertus_nemo.errors import ApertusError
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.typed import from_tree
from apertus_nemo.record.canonical import sha256_hex
from apertus_nemo.record.checkpoint_list import read_list
from apertus_nemo.record.checkpoints import checkpoint_step
from apertus_nemo.record.initial import expected_weights
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.seal import write_end
from apertus_nemo.record.step_line import StepLogHeader, new_run_id
from apertus_nemo.record.step_log import StepLogWriter
from apertus_nemo.training.assemble import DataModel, build_trainer, prepare_process
from apertus_nemo.training.checkpoint import prune, take_stock
from apertus_nemo.training.heartbeat import BUILDING, ENDING, Heart
from apertus_nemo.training.loggers import Charts
from apertus_nemo.training.observe import take_observation
from apertus_nemo.training.progress import Progress
from apertus_nemo.training.recorder import Recorder
from apertus_nemo.training.stopping import Stop


@dataclass(frozen=True)
class Place:
    """Where a rank is, and what it reads; nothing of it changes a number."""

    rank: int
    local_rank: int
    attempt: int
    corpus: Path  # a built corpus; with mixtures of built data, the folder of them
    cache: Path  # of the sample index; seen by all ranks
    initial: Path | None = None  # weights to start from, which were hashed; None: they are drawn
    rendezvous: Path | None = None  # file through which the ranks meet; None: MASTER_ADDR and MASTER_PORT


def train_rank(
    folder: Path,
    *,
    attempt: int,
    checkpoint_step: int | None,
    environment: Mapping[str, str],
    progress: Progress,
    heart: Heart | None = None,
    stop: Stop | None = None,
) -> None:
    """Train as the rank that `environment` names, in the run directory `folder`, on a corpus that was verified.

    `checkpoint_step`: go on from the checkpoint of this step, which was verified too; None: from the start.
    """
    directory = RunDirectory.open(folder)
    lock = RunLock.from_bytes(directory.lock.read_bytes(), what=str(directory.lock))
    run = from_tree(lock.tree["config"])
    rendezvous = environment.get("APERTUS_RENDEZVOUS")
    place = Place(
        rank=int(environment["RANK"]),
        local_rank=int(environment["LOCAL_RANK"]),
        attempt=attempt,
        corpus=Path(environment["APERTUS_CORPUS"]),
        cache=Path(environment["APERTUS_INDEX_CACHE"]),
        initial=Path(environment["APERTUS_INITIAL"]) if "APERTUS_INITIAL" in environment else None,
        rendezvous=None if rendezvous is None else Path(rendezvous),
    )
    progress.send("phase", text="building model and data")
    heart = heart or Heart()
    heart.beat(BUILDING)
    prepare_process(run)
    checkpoint = None if checkpoint_step is None else directory.checkpoint(checkpoint_step)
    train(
        run,
        directory,
        lock_digest=lock.digest,
        place=place,
        progress=progress,
        checkpoint=checkpoint,
        stop=stop,
        heart=heart,
        initial_weights=expected_weights(lock),
    )


def train(
    run: RunConfig,
    directory: RunDirectory,
    *,
    lock_digest: str,
    place: Place,
    progress: Progress,
    checkpoint: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    stop: Stop | None = None,
    heart: Heart | None = None,
    initial_weights: str | None = None,
) -> pl.Trainer:
    """Train to the end, from the step after `checkpoint` if one is given; collective over the ranks of the run.

    Ends after an earlier step, with a checkpoint of it, where `stop` asks for that. `initial_weights`: the digest
    that the weights must have which the run starts from.

    `prepare_process(run)` must have run. Rank 0 writes the record.
    """
    heart = heart or Heart()
    done = 0 if checkpoint is None else checkpoint_step(checkpoint)
    log = None
    if place.rank == 0:
        observed = take_observation(run, directory, attempt=place.attempt)
        header = StepLogHeader(lock_digest=lock_digest, run_id=new_run_id(), observation_digest=sha256_hex(observed))
        log = StepLogWriter.open(directory.steps, header)
        take_stock(directory, lock_digest=lock_digest)
    recorder = Recorder(
        run,
        directory,
        attempt=place.attempt,
        lock_digest=lock_digest,
        log=log,
        progress=progress if log is not None else Progress(None),
        stop=stop,
        heart=heart,
        initial_weights=initial_weights,
    )
    charts = []
    if log is not None:
        run_id = log.header.run_id
        charts = [Charts(run, directory, attempt=place.attempt, run_id=run_id, warn=partial(_warn, progress))]
    trainer = build_trainer(
        run,
        rank=place.rank,
        local_rank=place.local_rank,
        rendezvous=place.rendezvous,
        callbacks=[*charts, recorder, *callbacks],  # charts first: they time the step alone
    )
    model = DataModel(run, place.corpus, place.cache, first_step=done + 1)
    model.heart = heart
    if checkpoint is None or run.adapter.kind != "none":  # no checkpoint holds weights that are not trained
        model.initial = place.initial
    heart.beat()
    trainer.fit(model, ckpt_path=None if checkpoint is None else str(checkpoint))
    heart.beat(ENDING)
    if trainer.global_step != (recorder.last_step if recorder.stopped is None else recorder.stopped):
        raise ApertusError(f"training ended at step {trainer.global_step}, not at step {recorder.last_step}")
    if log is not None:
        log.sync()
        if recorder.stopped is None:
            _end_pruning(run, directory, attempt=place.attempt, step=recorder.last_step)
            write_end(directory.path, attempt=place.attempt, mark=log.mark())
        log.close()
    torch.distributed.barrier()
    return trainer


def _end_pruning(run: RunConfig, directory: RunDirectory, *, attempt: int, step: int) -> None:
    """What a kill after the last commit has left undone."""
    listed = read_list(directory.path)
    if listed.made:
        prune(directory, listed, attempt=attempt, newest=step, policy=run.trainer)


def _warn(progress: Progress, text: str) -> None:
    """A line for the user that does not end the run; in the rank's log too."""
    progress.send("warning", text=text)
    with contextlib.suppress(OSError):  # a full disk has no room for the rank's log
        print(f"warning: {text}", file=sys.stderr, flush=True)
