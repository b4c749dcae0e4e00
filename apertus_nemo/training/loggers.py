"""Curves for people: TensorBoard by default, Weights & Biases where the recipe asks for it.

    Charts(run, directory, attempt=0, run_id=run_id, warn=print)      # a callback; on rank 0 only

Both get the same few numbers of each step. They are no part of the record: nothing is read back, no digest covers
them, and they hold times. One that fails (full disk, no network) is left out for the rest of the attempt, with
one line.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.optim.schedule import learning_rate
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig, to_tree
from apertus_nemo.recipe.stages import StagePlan
from apertus_nemo.record.run_dir import RunDirectory

_WANDB_TIMEOUT_S = 30.0  # a server that does not answer costs this once at the start, and once at the end


class Chart(Protocol):
    """Where curves are drawn."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of one step."""

    def close(self) -> None:
        """No more steps come."""


class TensorBoard:
    """Event files for TensorBoard, one an attempt, in TensorBoard's own format; every step is written at once.

    A START event makes TensorBoard drop what earlier attempts logged from `first_step` on, so that steps which are
    executed again are not drawn twice.
    """

    def __init__(self, folder: Path, *, attempt: int, first_step: int, clock: Callable[[], float] = time.time) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._clock = Event, Summary, clock
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names
        self._file = io.BufferedWriter(io.FileIO(folder / f"events.out.tfevents.{attempt:010d}", "ab"))
        self._writer = RecordWriter(self._file)
        self._append(Event(wall_time=clock(), file_version="brain.Event:2"))
        self._append(Event(wall_time=clock(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all scalars (float32, as TensorBoard stores them)."""
        summary = self._summary(value=[self._summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._append(self._event(wall_time=self._clock(), step=step, summary=summary))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._file.flush()


class WeightsAndBiases:
    """A run of Weights & Biases, with the resolved recipe as its configuration.

    Its id is the run's own, so every attempt continues the same curves. Nothing of the machine, the environment, the
    command or the source is uploaded. Where it is online, the key comes from WANDB_API_KEY or the user's netrc file.
    """

    def __init__(self, run: RunConfig, folder: Path, *, run_id: str) -> None:
        try:
            import wandb  # takes a second, so only here
        except ImportError as error:
            raise UnfitEnvironment(f"{error}: install wandb, or leave out trainer.wandb") from error

        mode: Any = run.trainer.wandb
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            init_timeout=_WANDB_TIMEOUT_S,
            finish_timeout=_WANDB_TIMEOUT_S,
            finish_timeout_raises=False,
            console="off",  # output stays in the attempt's own files
            silent=True,
            symlink=False,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            mode=mode,
            project=run.trainer.wandb_project,
            name=run.name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(folder),
            config=to_tree(run),
            settings=settings,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the numbers to the process that stores or uploads them; a server takes each step once."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait, but not for long, until all is stored or uploaded."""
        self._run.finish()


class Charts(pl.Callback):
    """Hands loss, learning rate, gradient norm, tokens and their rate to every chart after each step."""

    def __init__(
        self,
        run: RunConfig,
        directory: RunDirectory,
        *,
        attempt: int,
        run_id: str,
        warn: Callable[[str], None],
    ) -> None:
        """`warn` is told, in one line, of a chart that is left out from now on."""
        self._run, self._attempt, self._run_id, self._warn = run, attempt, run_id, warn
        self._logs = directory.path / "logs"
        self._plan = BatchPlan.from_config(run)
        self._stages = StagePlan.from_config(run)
        self._charts: dict[str, Chart] = {}
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open what the recipe asks for."""
        first = trainer.global_step + 1
        settings = self._run.trainer
        if settings.tensorboard:
            self._open(
                "TensorBoard",
                lambda: TensorBoard(self._logs / "tensorboard", attempt=self._attempt, first_step=first),
            )
        if settings.wandb is not None:
            self._open("Weights & Biases", lambda: WeightsAndBiases(self._run, self._logs, run_id=self._run_id))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The step's clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The numbers of the step that was done; no other numbers than those of the record, and its speed."""
        if not self._charts:
            return
        step = trainer.global_step
        first, size = self._plan.batch_at(step)
        reported: Mapping[str, Any] = pl_module.values  # type: ignore[assignment]
        loss, grad_norm = float(reported["reduced_train_loss"]), float(reported["grad_norm"])
        seconds = time.perf_counter() - self._started  # after the numbers have come from the device
        values = {
            "loss": loss,
            "learning_rate": learning_rate(self._run, first),
            "grad_norm": grad_norm,
            "consumed_tokens": float(self._stages.consumed_tokens(first + size)),
            "tokens_per_second": size * self._stages.at(first).seq_length / seconds if seconds > 0 else 0.0,
        }
        for name in list(self._charts):
            self._attempted(name, lambda chart: chart.write(step, values))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close all."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close all; the run ends with `exception`."""
        self._close()

    def _close(self) -> None:
        for name in list(self._charts):
            self._attempted(name, lambda chart: chart.close())
        self._charts.clear()

    def _open(self, name: str, make: Callable[[], Chart]) -> None:
        try:
            self._charts[name] = make()
        except Exception as error:
            self._warn(_left_out(name, error))

    def _attempted(self, name: str, use: Callable[[Chart], None]) -> None:
        try:
            use(self._charts[name])
        except Exception as error:
            chart = self._charts.pop(name)
            with contextlib.suppress(Exception):
                chart.close()
            self._warn(_left_out(name, error))


def _left_out(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{name} is left out from now on, the run goes on without it: {reason}"
