"""What planning costs: `plan` in total, and `plan --build` beyond importing Megatron-core; pairs, one after the other.

The run is of the published 70B sizes on 4,096 GPUs, and the ranks built are the first and the last one. Then `plan` of
every packaged recipe; the slowest of each round counts.

    python benchmarks/plan.py [--pairs 5]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.unit.plan.recipes import write  # noqa: E402
from tests.unit.recipe.given import GIVEN  # noqa: E402

RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml"))

PLAN_GOAL_S, BUILD_GOAL_S = 1.0, 15.0
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
IMPORT = START + "from apertus_nemo.training import imports; imports.install(); import apertus_nemo.model.config"
COMMAND = START + "from apertus_nemo.cli.main import main; sys.exit(main())"


def seconds(*argv: str) -> float:
    """Wall time of one Python process."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", *argv], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode not in (0, 2):  # 2: planned, and refused for its size
        sys.exit(done.stderr.decode())
    return time.perf_counter() - begin


def main() -> int:
    """Print the figures; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [COMMAND, "plan", "--recipes", str(write(Path(folder) / "here")), "recipe=published_70b"]
        seconds(IMPORT)  # fill the cache of the disk
        rounds = [
            (seconds(*command), seconds(IMPORT), seconds(*command, "--build", "0,4095")) for _ in range(options.pairs)
        ]
        slowest = [
            max(seconds(COMMAND, "plan", f"recipe={recipe}", *GIVEN.get(recipe, [])) for recipe in RECIPES)
            for _ in range(options.pairs)
        ]
    figures = [
        Figure.of("`plan`, 70B on 4,096 GPUs", [plan for plan, _, _ in rounds], unit="s", at_most=PLAN_GOAL_S),
        Figure.of(f"`plan`, the slowest of {len(RECIPES)} recipes", slowest, unit="s", at_most=PLAN_GOAL_S),
        Figure.of(
            "`plan --build 0,4095`, more than importing Megatron-core",
            [build - bare for _, bare, build in rounds],
            unit="s",
            at_most=BUILD_GOAL_S,
        ),
        Figure.of("`plan --build 0,4095` over importing Megatron-core", [b / i for _, i, b in rounds], unit="x"),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
