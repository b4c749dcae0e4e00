"""`apertus-nemo plan`: what a person and a program see, exit codes, and that it is light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from tests.unit.plan.recipes import write

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def recipes(tmp_path: Path) -> str:
    return str(write(tmp_path / "here"))


def test_text(recipes: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipes", recipes, "recipe=published_70b", "--tokens-per-s", "723"]
    assert main(["plan", *arguments, "--checkpoint-s", "40", "--mtbf-h", "3"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert lines[0] == "published_70b: 1,155,828 steps, 14,999,988,731,904 tokens, 4,096 gh200 GPUs"
    assert "parameters     70,599,864,480, a layer 855,654,658" in lines
    assert "FLOPs          4.4936e+11 a token, 6.740e+24 in all" in lines
    assert "checkpoint     1.27 TB, 141 GB of them weights; one every 15 min loses least (164 steps)" in lines
    assert "learning rate  up to 1e-05 by step 2,000, down to 1e-06 from step 1,057,219" in lines


def test_json(recipes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipes", recipes, "recipe=published_8b", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["parameters"]["total"] == 8_053_338_176
    assert tree["accelerator"]["name"] == "gh200"
    assert "built" not in tree


def test_refused(recipes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is printed all the same: it says where the memory goes."""
    assert main(["plan", "--recipes", recipes, "recipe=published_8b", "--gpu", "h100"]) == 2
    output = capsys.readouterr()
    assert output.out.startswith("published_8b: 2,627,139 steps")
    assert output.err.startswith("apertus-nemo: published_8b cannot work: rank 0 needs ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--build", "4096"], "there is no rank 4096: the run has ranks 0 to 4095"),
        (["--gpu", "tpu"], "there is no accelerator 'tpu' in the plan's table; there are gh200, h100"),
        (["--mfu", "1.5"], "a utilisation is above 0 and at most 1, and 1.5 is not"),
    ],
)
def test_wrong_input(recipes: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipes", recipes, "recipe=published_70b", *arguments]) == 2
    assert capsys.readouterr().err == f"apertus-nemo: {message}\n"


def test_ranks_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--build", "first"]) == 2
    assert "ranks are numbers with commas between them, and 'first' is not" in capsys.readouterr().err


def test_impossible_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "trainer.global_batch_size=7"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "7 samples are no whole number of micro-batches" in output.err


def test_light() -> None:
    asks = (
        "import sys\nfrom apertus_nemo.cli.main import main\nmain(['plan'])\n"
        "print(sorted({'torch', 'nemo', 'megatron', 'numpy'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", asks], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.splitlines()[-1] == "[]"
