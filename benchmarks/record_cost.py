"""What the record costs in a step of the tiny model: the same training, with and without it by turns.

    python benchmarks/record_cost.py [--pairs 100]

One run of `tiny_pretrain` through NeMo's trainer in one process. Steps with everything that a run does for its record
(digest of each sample and of the batch, line of the log, events for the launcher, curves, the question whether to stop)
and steps with nothing of it follow each other in pairs, each kind first in every other pair; schedules are applied in
both. A step is all between the ends of two steps, reading the data included. State digests and checkpoints are where a
run has them: at the start and at the end, outside of what is timed.
Goal: at most 2 % more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import Figure, finish

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WARM_UP = 6  # steps
GOAL = 1.02


def measure(folder: Path, corpus: Path, pairs: int) -> list[tuple[dict[bool, float], dict[bool, float]]]:
    """For each pair: wall time and processor time of its two steps, by whether the record was on."""
    import lightning.pytorch as pl

    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.training import loggers, module, recorder
    from apertus_nemo.training.assemble import prepare_process
    from apertus_nemo.training.progress import Progress
    from apertus_nemo.training.run import Place, train
    from apertus_nemo.training.stopping import Stop
    from tests.crash.kills import begin

    steps = WARM_UP + 2 * pairs + 1
    base = compose("tiny_pretrain").config
    batch = base.trainer.global_batch_size
    overrides = ["schedule.batch_ramp=[]", "schedule.decay_samples=0", f"schedule.train_samples={steps * batch}"]
    run = compose("tiny_pretrain", overrides).config
    prepare_process(run)
    on = [True]
    real_end, real_charts, real_digest = (
        recorder.Recorder.on_train_batch_end,
        loggers.Charts.on_train_batch_end,
        module.sample_digest,
    )

    def recorded(self: Any, trainer: Any, *arguments: Any) -> None:
        if on[0]:
            self._log.last_step = trainer.global_step - 1  # the log misses the steps without
            real_end(self, trainer, *arguments)
        else:
            self._consumed += self._plan.batch_at(trainer.global_step)[1]

    def drawn(self: Any, *arguments: Any) -> None:
        if on[0]:
            real_charts(self, *arguments)

    recorder.Recorder.on_train_batch_end = recorded  # type: ignore[method-assign]
    loggers.Charts.on_train_batch_end = drawn  # type: ignore[method-assign]
    module.sample_digest = lambda sample: real_digest(sample) if on[0] else b""

    class Clock(pl.Callback):
        """The last callback of each step: takes the time, and says what the next step is."""

        def __init__(self) -> None:
            self.taken: list[tuple[bool, float, float]] = []
            self._wall, self._cpu = 0.0, 0.0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            wall, cpu, step = time.perf_counter(), time.process_time(), trainer.global_step
            if WARM_UP < step <= WARM_UP + 2 * pairs:
                self.taken.append((on[0], wall - self._wall, cpu - self._cpu))
            pair, second = divmod(step - WARM_UP, 2)
            on[0] = step < WARM_UP or step >= steps - 1 or (pair + second) % 2 == 0
            self._wall, self._cpu = time.perf_counter(), time.process_time()

    clock = Clock()
    directory = begin(folder / "run", overrides)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as launcher:
        assert launcher.stdin is not None
        train(
            run,
            directory,
            lock_digest="0" * 64,
            place=Place(0, 0, directory.new_attempt(), corpus, folder / "index", rendezvous=folder / "rendezvous"),
            progress=Progress(launcher.stdin.fileno()),
            callbacks=[clock],
            stop=Stop(time_s=1e6),
        )
    found = []
    for one, other in zip(clock.taken[::2], clock.taken[1::2], strict=True):
        if one[0] == other[0]:
            raise SystemExit("a pair has two steps of one kind")
        found.append(({one[0]: one[1], other[0]: other[1]}, {one[0]: one[2], other[0]: other[2]}))
    return found


def main() -> int:
    """Run and print; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of steps (default: 100)")
    parser.add_argument("--cache", type=Path, help="folder of the corpus, to be kept (default: made anew)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()

    from apertus_nemo.training import imports

    imports.install()
    from apertus_nemo.data.corpus import embedded

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = embedded((options.cache or folder) / "corpus", 4096)
        pairs = measure(folder, corpus, max(4, options.pairs))
    figures = [
        Figure.of("a step of the tiny model with its record", [1e3 * wall[True] for wall, _ in pairs], unit="ms"),
        Figure.of(
            "a step with its record over one without", [w[True] / w[False] for w, _ in pairs], unit="x", at_most=GOAL
        ),
        Figure.of("the same, processor time", [c[True] / c[False] for _, c in pairs], unit="x"),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
