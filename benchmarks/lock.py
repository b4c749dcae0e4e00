"""What a lock costs at the start of a run: its packages hashed the first time, and from the cache after that.

    python benchmarks/lock.py [--runs 10]

Each measurement is a process of its own and builds the whole lock (source, packages, machine) but for the data.
Prints the first time and the median of the later ones, with quartiles.
Goal: at most 0.5 s from the cache, without torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
GOAL_S = 0.5
SCRIPT = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from apertus_nemo.recipe.compose import compose
config = compose("tiny_pretrain").config
begin = time.perf_counter()
from apertus_nemo.launch.environment import rank_environment
from apertus_nemo.record.lock import build_lock, look
from apertus_nemo.record.source import find_source
here = look(source=find_source(allow_dirty=True), cache=Path(sys.argv[1]))
build_lock(config, overrides=[], environment=rank_environment(config, os.environ), data=None, surroundings=here).digest
print(json.dumps([time.perf_counter() - begin, len(here.packages), "torch" in sys.modules]))
"""


def once(cache: Path) -> tuple[float, int, bool]:
    """Seconds, number of packages, whether torch was imported."""
    command = [sys.executable, "-c", SCRIPT.format(root=str(ROOT)), str(cache)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd="/")
    seconds, packages, torch = json.loads(done.stdout)
    return seconds, packages, torch


def main() -> int:
    """Print the figures; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=10, help="measurements from the cache (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first, packages, _ = once(Path(folder))
        later = [once(Path(folder)) for _ in range(max(2, options.runs))]
    if any(imported for _, _, imported in later):
        raise SystemExit("building the lock imported torch")
    figures = [
        Figure.of(f"building the lock, {packages} packages, the first time", [first], unit="s"),
        Figure.of("building the lock, hashes from the cache", [s for s, _, _ in later], unit="s", at_most=GOAL_S),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
