"""What the command costs before it does anything: `--help` over a bare Python start, and `show` in total.

    python benchmarks/startup.py [--runs 20]

Each round starts a bare Python, the help and `show`, one after the other, so that what else the machine does meets
all three. Prints medians with quartiles, the differences and ratios taken round by round.
Goals: help at most 150 ms over the bare start, show at most 1 s.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from figures import Figure, finish

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
    found = measure(max(2, options.runs))
    figures = [
        Figure.of(
            "`--help`, more than a bare Python", _ms(found["help - bare"]), unit="ms", at_most=HELP_GOAL_S * 1000
        ),
        Figure.of("`--help` over a bare Python", found["help / bare"], unit="x"),
        Figure.of("`show`, in total", _ms(found["show"]), unit="ms", at_most=SHOW_GOAL_S * 1000),
        Figure.of("`show` over a bare Python", found["show / bare"], unit="x"),
    ]
    return finish(figures, as_json=options.json)


def _ms(seconds: list[float]) -> list[float]:
    return [value * 1000 for value in seconds]


if __name__ == "__main__":
    sys.exit(main())
