"""Time from command to first step, against `python -c "import nemo.lightning"`; pairs, one after the other.

The command is `apertus-nemo train trainer.max_steps=1` with the embedded corpus built already: composing, checking,
locking, verifying the data, starting the rank, imports, building the model, the first step. The end is the rank's own
event of its first step.

    python benchmarks/first_step.py [--pairs 5]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]


def baseline(environment: dict[str, str]) -> float:
    """Seconds for a bare import of nemo.lightning."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import nemo.lightning"], env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def first_step(environment: dict[str, str], folder: Path) -> float:
    """Seconds from the start of the command to the event of step 1."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "apertus_nemo.cli.main", "train", "--allow-dirty", "trainer.max_steps=1", "--json"]
    with subprocess.Popen(
        [*command, "--run-dir", str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        took = None
        for line in process.stdout:
            if took is None and json.loads(line)["event"] == "step":
                took = time.perf_counter() - start
    if took is None or process.returncode:
        raise SystemExit(f"the run in {folder} failed: see its attempts/")
    return took


def main() -> int:
    """Run and print; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        first_step(environment, Path(scratch) / "warm-up")
        pairs = [
            (baseline(environment), first_step(environment, Path(scratch) / f"run-{number}"))
            for number in range(options.pairs)
        ]
    ratios = [ours / bare for bare, ours in pairs]
    figures = [
        Figure.of("`import nemo.lightning`", [bare for bare, _ in pairs], unit="s"),
        Figure.of("command to first step", [ours for _, ours in pairs], unit="s"),
        Figure.of("command to first step over `import nemo.lightning`", ratios, unit="x", at_most=1.2),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
