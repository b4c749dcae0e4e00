"""The callback that turns a run into a record: step log, state digests, checkpoints.

Called on every rank, since digests and checkpoints are collective; rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state

from apertus_nemo.errors import ApertusError, Differs, UnfitEnvironment
from apertus_nemo.optim.module import apply_schedule
from apertus_nemo.optim.schedule import learning_rate
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan
from apertus_nemo.record.files import read_bytes, write_atomic
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.seal import write_seal
from apertus_nemo.record.state import StateDigest
from apertus_nemo.record.step_log import StepLogWriter, StepRecord
from apertus_nemo.training.checkpoint import save_checkpoint
from apertus_nemo.training.heartbeat import FIRST_STEP as FIRST
from apertus_nemo.training.heartbeat import SAVING, STEP, Heart
from apertus_nemo.training.module import ApertusModule
from apertus_nemo.training.progress import FIRST_STEP, Progress
from apertus_nemo.training.state import frozen_weights, state_digest
from apertus_nemo.training.stopping import Stop

_MAX_STATE_BYTES = 2**30


class Recorder(pl.Callback):
    """Applies the schedules before each step and writes what the step gave."""

    def __init__(
        self,
        run: RunConfig,
        directory: RunDirectory,
        *,
        attempt: int,
        lock_digest: str,
        log: StepLogWriter | None,
        progress: Progress,
        stop: Stop | None = None,
        heart: Heart | None = None,
        initial_weights: str | None = None,
    ) -> None:
        """`log` is None on every rank but the first; `stop` None on all or on no rank.

        `initial_weights` is the digest that the weights must have that training starts from; None where none is known.
        """
        self._initial_weights = initial_weights
        self._heart = heart or Heart()
        self._run = run
        self._plan = BatchPlan.from_config(run)
        self._stages = StagePlan.from_config(run)
        self._directory = directory
        self._attempt = attempt
        self._lock_digest = lock_digest
        self._stop = stop
        self.stopped: int | None = None  # the step after which the run was stopped, as asked
        self._log = log
        self._progress = progress
        self._consumed = 0  # samples
        self._tokens, self._started = 0, 0.0

    @property
    def last_step(self) -> int:
        """The step that ends this run."""
        limit = self._run.trainer.max_steps
        return self._plan.num_steps if limit is None else min(limit, self._plan.num_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Digest the state that training starts from; a checkpoint's must be the one that was logged."""
        step = trainer.global_step
        if self._stop is not None:
            self._stop.listen()  # in the place of Lightning's handler, which would raise after the step
        self._heart.beat(SAVING, step)  # digesting takes as long as saving does
        state = state_digest(trainer, self._run, step)
        if step == 0:
            weights = state.digest_of_kind("weight")
            if self._log is not None and self._initial_weights not in (None, weights):
                raise Differs(
                    f"the weights to start from have the digest {weights}, "
                    f"and {self._initial_weights} was logged of them"
                )
            self._write(StepRecord(step=0), state)
        elif self._log is not None and self._directory.state(step).exists():
            self._compare(state)
        if step > 0:
            self._check_frozen(trainer)
        self._consumed = self._plan.consumed_samples(step)
        if self._stop is not None:
            self._stop.begun()
        self._progress.send("phase", text=FIRST_STEP)
        self._heart.beat(FIRST, step + 1)
        self._started = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set learning rate, alpha and beta3 of the step that begins."""
        step = trainer.global_step + 1
        self._heart.beat(step=step)
        assert isinstance(pl_module, ApertusModule)
        pl_module.values.clear()
        pl_module.sample_digests.clear()
        for optimizer in trainer.optimizers:
            apply_schedule(optimizer, self._run, step, self._consumed)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log the step; digest and save where due."""
        step = trainer.global_step
        self._heart.beat(STEP)
        first, size = self._plan.batch_at(step)
        assert isinstance(pl_module, ApertusModule)
        read = len(pl_module.sample_digests) * self._run.data_parallel_size
        if read != size:
            raise ApertusError(f"step {step} read {read} samples, and the plan says {size}")
        self._consumed += read
        batch = _batch_digest(pl_module.sample_digests, self._run)
        last = step == self.last_step
        settings = self._run.trainer
        save = last or (settings.checkpoint_every_steps > 0 and step % settings.checkpoint_every_steps == 0)
        every = self._run.reproducibility.state_digest_every_steps
        state = None
        if save or (every > 0 and step % every == 0):
            self._heart.beat(SAVING)
            state = state_digest(trainer, self._run, step)
        loss = float(pl_module.values["reduced_train_loss"])
        grad_norm = float(pl_module.values["grad_norm"])
        rate = learning_rate(self._run, first)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)) and self._log is not None:
            raise UnfitEnvironment(
                f"step {step}: loss is {loss}, gradient norm is {grad_norm}: "
                f"lower optim.lr, or check the data of samples {first} to {first + size - 1}"
            )
        if last:
            self._check_frozen(trainer)
        record = StepRecord(
            step=step,
            consumed_samples=self._consumed,
            consumed_tokens=self._stages.consumed_tokens(self._consumed),
            global_batch_size=size,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            batch_digest=batch,
        )
        self._write(record, state)
        stage = self._stages.at(first)
        self._tokens += size * stage.seq_length
        self._progress.send(
            "step",
            step=step,
            steps=self.last_step,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            stage=stage.name if len(self._stages.stages) > 1 else None,
            tokens=self._tokens,
            seconds=time.perf_counter() - self._started,
        )
        stopping = not last and self._stop is not None and self._stop.agreed(settings.accelerator)
        if save or stopping:
            self._heart.beat(SAVING)
            if self._log is not None:
                self._log.sync()
                write_seal(self._directory.path, attempt=self._attempt, mark=self._log.mark())
            self._progress.send("phase", text=f"saving checkpoint of step {step}")
            save_checkpoint(
                trainer,
                self._directory,
                attempt=self._attempt,
                step=step,
                lock_digest=self._lock_digest,
                policy=settings,
            )
            if self._stop is not None:
                self._stop.saved()
        self._heart.beat(STEP)
        if stopping:
            self.stopped = step
            trainer.should_stop = True
            self._progress.send("stopped", step=step, steps=self.last_step)

    def _check_frozen(self, trainer: pl.Trainer) -> None:
        """Hold the weights beside adapters, which no checkpoint has, against those of step 0: at starts, at the end."""
        if self._run.adapter.kind == "none":
            return
        found = frozen_weights(trainer, self._run)
        path = self._directory.state(0)
        if self._log is None or not path.exists():
            return
        first = StateDigest.from_bytes(read_bytes(path, max_bytes=_MAX_STATE_BYTES), what=str(path))
        logged = {tensor.name: tensor for tensor in first.tensors if tensor.kind == "weight"}
        for tensor in found:
            if logged.get(tensor.name) != tensor:
                raise Differs(
                    f"the frozen weights are not those that the run began with: {tensor.name} is another than in {path}"
                )

    def _compare(self, state: StateDigest) -> None:
        """Hold the state that a checkpoint gave against the one that was written before it was saved."""
        path = self._directory.state(state.step)
        logged = StateDigest.from_bytes(read_bytes(path, max_bytes=_MAX_STATE_BYTES), what=str(path))
        if logged.digest == state.digest:
            return
        pairs = zip(logged.tensors, state.tensors, strict=False)
        names = (f"{a.name} ({a.kind})" for a, b in pairs if a.to_list() != b.to_list())
        raise Differs(
            f"the checkpoint of step {state.step} gives another state than was logged in {path}: first "
            f"{next(names, 'the list of tensors')}"
        )

    def _write(self, record: StepRecord, state: StateDigest | None) -> None:
        """Log the step, or hold it against what was logged; then write the tensors' digests."""
        if self._log is None:
            return
        self._log.append(record if state is None else dataclasses.replace(record, state_digest=state.digest))
        if state is not None:
            write_atomic(self._directory.state(record.step), state.to_bytes())


def _batch_digest(samples: list[bytes], run: RunConfig) -> str:
    """SHA-256 over the SHA-256 of each sample, in the order of training, whatever the data-parallel size."""
    size = run.data_parallel_size
    if size > 1:
        mine = torch.frombuffer(bytearray(b"".join(samples)), dtype=torch.uint8)
        if run.trainer.accelerator == "gpu":
            mine = mine.cuda()
        gathered = [torch.empty_like(mine) for _ in range(size)]
        torch.distributed.all_gather(gathered, mine, group=parallel_state.get_data_parallel_group())
        shards = [bytes(shard.cpu().numpy().tobytes()) for shard in gathered]
        micro = run.trainer.micro_batch_size * 32
        count = len(shards[0]) // micro
        samples = [shard[j * micro : (j + 1) * micro] for j in range(count) for shard in shards]
    return hashlib.sha256(b"".join(samples)).hexdigest()
