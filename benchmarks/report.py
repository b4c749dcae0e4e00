"""What a report costs: the command on a small record, and the page of a log of a million steps over verifying it.

    python benchmarks/report.py [--rounds 5] [--steps 1000000]

Times the command `apertus-nemo report` on a record of 20 steps from start to end, in a process of its own; then, in
this process, by turns and with the imports done, `verify` of a long log and the rest of its report (curves and page).
Goals: the command within 2 s; the rest within the time of verify and a half; the long page at most 0.3 MB more than
the short one.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, finish
from verify import checked, record

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apertus_nemo.report.gather import gather  # noqa: E402
from apertus_nemo.report.page import page  # noqa: E402


def command(folder: Path) -> float:
    """Wall time of the command, in seconds."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "apertus_nemo.cli.main", "report", str(folder)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - started


def rest(folder: Path) -> int:
    """Everything of a report but its verdict; the size of the page in bytes."""
    return len(page(gather([str(folder)], check=False)))


def main() -> int:
    """Print the figures; 1 where a median misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the long log (default: 1000000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small = record(Path(name) / "small", steps=20, files=4, size_bytes=4096)
        long = record(Path(name) / "long", steps=options.steps, files=0, size_bytes=0)
        short_bytes, long_bytes = rest(small), rest(long)
        commands, ratios = [], []
        for _ in range(max(2, options.rounds)):
            commands.append(command(small))
            times = []
            for action in (checked, rest):
                started = time.process_time()
                action(long)
                times.append(time.process_time() - started)
            ratios.append(times[1] / times[0])
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps = f"{options.steps:,} steps"
    figures = [
        Figure.of("`report`, a small record, from start to end", commands, unit="s", at_most=2.0),
        Figure.of(f"`report` without its verdict, {steps}, over `verify`", ratios, unit="x", at_most=1.5),
        Figure.of(
            f"the page of {steps}, more than that of 20", [(long_bytes - short_bytes) / 1e6], unit="MB", at_most=0.3
        ),
        Figure.of("most memory of verifying, reading and drawing it", [peak_mib], unit="MiB"),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
