"""What the command costs before it does anything: `--help` over a bare Python start, and `show` in total.

    python benchmarks/startup.py [--runs 20]

Each round starts a bare Python, the help and `show`, one after the other, so that what else the machine does meets
all three. Prints medians with quartiles, the differences and ratios taken round by round.
Goals: help at most 150 ms over the bare start, show at most 1 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CALL = "import sys; sys.path.insert(0, {root!r}); from apertus_nemo.cli.main import main; sys.exit(main({arguments!r}))"
HELP_GOAL_S, SHOW_GOAL_S = 0.150, 1.0


def command(*arguments: str) -> list[str]:
    """A Python process that runs `apertus-nemo` with these arguments, from this checkout."""
    return [sys.executable, "-c", CALL.format(root=str(ROOT), arguments=list(arguments))]


def seconds(argv: list[str]) -> float:
    """Wall time of one process, start to exit."""
    begin = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, cwd="/")
    return time.perf_counter() - begin


def spread(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def measure(runs: int) -> dict[str, list[float]]:
    """Seconds (or ratios) of each round."""
    found: dict[str, list[float]] = {"bare": [], "help": [], "show": []}
    kinds = {"bare": [sys.executable, "-c", "pass"], "help": command("--help"), "show": command("show")}
    for argv in kinds.values():  # compile to bytecode, fill the disk's cache
        seconds(argv)
    for _ in range(runs):
        for kind, argv in kinds.items():
            found[kind].append(seconds(argv))
    found["help - bare"] = [h - b for h, b in zip(found["help"], found["bare"], strict=True)]
    found["help / bare"] = [h / b for h, b in zip(found["help"], found["bare"], strict=True)]
    found["show / bare"] = [s / b for s, b in zip(found["show"], found["bare"], strict=True)]
    return found


def main() -> int:
    """Print the table; 1 where a median misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=20, help="rounds (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    table = {name: spread(values) for name, values in measure(max(2, options.runs)).items()}
    if options.json:
        print(json.dumps(table, indent=2, sort_keys=True))
    else:
        for name, (low, middle, high) in table.items():
            scale, unit = (1, "x") if "/" in name else (1000, "ms")
            print(f"{name:12} {middle * scale:8.1f} {unit}   quartiles {low * scale:.1f} .. {high * scale:.1f}")
    met = table["help - bare"][1] <= HELP_GOAL_S and table["show"][1] <= SHOW_GOAL_S
    print(f"goals (help - bare <= 150 ms, show <= 1000 ms): {'met' if met else 'MISSED'}", file=sys.stderr)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
