"""How long each small recipe takes on a CPU from the command to its end, all stages and steps; cold, in turn.

`tiny_continued` starts from the export of the `tiny_pretrain` run, on a corpus made of this repository's documents,
`tiny_long_context` from the run itself. The text that comes with Python is prepared before, and is not counted.

    python benchmarks/twins.py [--recipes tiny_sft ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GOAL_S = 120.0
RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "recipe").glob("tiny_*.yaml"))
FIRST = "tiny_pretrain"  # others start from it

# What a user gives; in braces: folders of this benchmark
GIVEN = {
    "tiny_long_context": ["initial.path={run}"],
    "tiny_continued": ["initial.path={export}", "data.path={corpus}"],
}


def typed(folder: Path, *words: str) -> float:
    """Wall time of the command, in seconds."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "apertus_nemo.cli.main", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - begin


def tokenizer() -> str:
    """That of the text that comes with Python, which the runs use."""
    from apertus_nemo.data.corpus import embedded_folder
    from apertus_nemo.launch.local import default_cache

    return str(embedded_folder(default_cache(os.environ) / "corpus", 4096) / "tokenizer")


def main() -> int:
    """Print the figures; 1 where a recipe takes too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="RECIPE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        typed(folder, "train", "-q", "--allow-dirty", "--run-dir", "warm", "trainer.max_steps=1")
        if FIRST in options.recipes or GIVEN.keys() & set(options.recipes):
            first = typed(folder, "train", "-q", "--allow-dirty", "--run-dir", FIRST, f"recipe={FIRST}")
            figures.append(figure(FIRST, first))
        places = {"run": FIRST, "export": "export", "corpus": "corpus"}
        if "tiny_continued" in options.recipes:
            typed(folder, "convert", "export", FIRST, "export")
            texts = [option for path in sorted((ROOT / "docs").glob("*.md")) for option in ("--input", str(path))]
            typed(folder, "data", "build", *texts, "--tokenizer", tokenizer(), "--output", "corpus")
        for recipe in options.recipes:
            if recipe != FIRST:
                overrides = [override.format(**places) for override in GIVEN.get(recipe, [])]
                seconds = typed(
                    folder, "train", "-q", "--allow-dirty", "--run-dir", recipe, f"recipe={recipe}", *overrides
                )
                figures.append(figure(recipe, seconds))
    return finish(figures, as_json=options.json)


def figure(recipe: str, seconds: float) -> Figure:
    """One recipe's time against the goal."""
    return Figure.of(f"`{recipe}`, command to end", [seconds], unit="s", at_most=GOAL_S)


if __name__ == "__main__":
    sys.exit(main())
