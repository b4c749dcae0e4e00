"""The import guard: refuses the listed pairs and nothing else, and NeMo does without what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.testing.ranks import Parent
from apertus_nemo.training.imports import GUARDED

PAIRS = sorted(GUARDED)

ASK = """
import importlib.util, sys
from apertus_nemo.training import imports
imports.install()
imports.install()
module, importer = sys.argv[1:]
code = compile("import importlib.util\\nfound = importlib.util.find_spec(module)", importer, "exec")
try:
    exec(code, space := {"module": module})
    print("found" if space["found"] else "not installed")
except ModuleNotFoundError as error:
    print("refused" if error.name == module and "not used here" in str(error) else f"broken: {error}")
print(sum(type(finder).__name__ == "_Guard" for finder in sys.meta_path))
"""


def ask(module: str, importer: str) -> str:
    """What a file of that name gets for that module: "found", "not installed" or "refused"."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, module, importer], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, guards = done.stdout.split("\n")[:2]
    assert guards == "1"
    return answer


@pytest.mark.parametrize(("module", "importer"), PAIRS)
def test_a_listed_pair_is_refused(module: str, importer: str) -> None:
    assert ask(module, f"/somewhere/site-packages/{importer}") == "refused"


@pytest.mark.parametrize("module", sorted({module for module, _ in PAIRS}))
def test_any_other_importer_gets_the_module(module: str) -> None:
    answer = ask(module, "/somewhere/site-packages/other/file.py")
    assert answer in ("found", "not installed")
    assert answer == "found" or module in ("webdataset", "wandb")  # the others are dependencies of ours


def test_nemo_imports_without_what_is_refused(parent: Parent) -> None:
    """The parent of all forked cases has imported NeMo behind the guard, and has met each pair."""
    [seen] = parent.run("tests.cases.training:guarded")
    assert sorted(map(tuple, seen["met"])) == PAIRS
    assert set(seen["present"]) <= {"pandas", "scipy"}  # NeMo's tokenizers and torchmetrics want them, unguarded
    assert {"nemo.lightning", "megatron.core", "lightning.pytorch", "transformers"} <= set(seen["imported"])


def test_it_looks_for_the_name_of_a_real_file() -> None:
    """An importer that upstream moved would never be met again."""
    packages = Path(next(path for path in sys.path if path.endswith("site-packages")))
    for _, importer in PAIRS:
        assert (packages / importer).is_file(), importer
