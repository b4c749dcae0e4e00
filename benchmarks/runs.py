"""What `runs` costs: hundreds of runs with long logs, over reading those logs.

    python benchmarks/runs.py [--rounds 5] [--runs 300] [--steps 20000]

Makes that many run directories, each with lock, log and two attempts, in a folder of its own (the logs share their
bytes: hard links), then times by turns, in one process, the imports done: listing them all, and reading every byte of
one log (the verified chain), times the number of runs.
Goals: at most a second for 300 runs; at most 0.1 of reading the logs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apertus_nemo.audit.status import find_runs, look  # noqa: E402
from apertus_nemo.record.attempts import AttemptProgress, Outcome, write_outcome, write_progress  # noqa: E402
from apertus_nemo.record.step_log import StepLogReader  # noqa: E402
from tests.unit.audit.sealed import make_sealed  # noqa: E402

LIST_GOAL_S, RATIO_GOAL = 1.0, 0.1


def make(folder: Path, runs: int, steps: int) -> Path:
    """Run directories below `folder`; the first one."""
    first = make_sealed(folder / "run-0", finished=False, steps=steps, saved=(), segment_lines=100_000)
    for number in range(runs):
        run = folder / f"run-{number}"
        for name in ("attempts/000", "attempts/001", "steps"):
            (run / name).mkdir(parents=True, exist_ok=True)
        if number:
            for name in ("lock.json", "steps/000000.jsonl"):
                os.link(first / name, run / name)
        write_outcome(run, 0, Outcome("killed", "rank 1 was killed by signal 9", 3, step=9, rank=1, signal=9))
        write_progress(run, 1, AttemptProgress("training", 10, steps, steps, 2.5, 1_000_000, 60_000))
        write_outcome(run, 1, Outcome("stopped", f"stopped as asked after step {steps}", 0, step=steps))
    return first


def main() -> int:
    """Print the table; 1 where a median misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--runs", type=int, default=300, help="run directories (default: 300)")
    parser.add_argument("--steps", type=int, default=20_000, help="steps of each (default: 20000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    listed, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        first = make(Path(folder), options.runs, options.steps)
        for _ in range(max(2, options.rounds)):
            begin = time.perf_counter()
            found = list(look(find_runs([Path(folder)])))
            middle = time.perf_counter()
            for _record in StepLogReader(first / "steps"):
                pass
            whole = (time.perf_counter() - middle) * options.runs
            if len(found) != options.runs or {run.state for run in found} != {"stopped"}:
                raise SystemExit(f"wrong list: {found[0]}")
            listed.append((middle - begin) * 300 / options.runs)
            ratios.append((middle - begin) / whole)
    figures = [
        Figure.of("runs, for 300 of them", listed, unit="s", at_most=LIST_GOAL_S),
        Figure.of(f"runs over reading their logs of {options.steps} steps", ratios, unit="x", at_most=RATIO_GOAL),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
