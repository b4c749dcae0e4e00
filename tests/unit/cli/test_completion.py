"""What a shell is told when it completes a line: in bash itself, by the script that the verb prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from apertus_nemo.cli.main import VERBS, main

ROOT = Path(__file__).resolve().parents[3]
BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script for bash, and the command on a PATH of its own."""
    folder = tmp_path_factory.mktemp("completion")
    command = folder / "apertus-nemo"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from apertus_nemo.cli.main import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    printed = subprocess.run([str(command), "completion", "bash"], capture_output=True, text=True, timeout=60)
    assert (printed.returncode, printed.stderr) == (0, "")
    (folder / "script").write_text(printed.stdout)
    return folder


def complete(script: Path, line: str, *, folder: Path | None = None) -> list[str]:
    """What bash offers when the tab key is pressed at the end of `line`."""
    assert BASH is not None
    asks = f"""
        source {script}/script
        COMP_LINE="$1" COMP_POINT=${{#1}} COMP_TYPE=63 COMP_KEY=9
        _python_argcomplete apertus-nemo
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{script}:{os.environ['PATH']}"}
    done = subprocess.run(
        [BASH, "--norc", "-c", asks, "bash", line],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in done.stdout.split("\n") if word.strip()]


pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")


def test_verbs(script: Path) -> None:
    assert set(VERBS) <= set(complete(script, "apertus-nemo "))
    assert complete(script, "apertus-nemo rel") == ["relaunch"]


def test_options(script: Path) -> None:
    offered = complete(script, "apertus-nemo train --")
    assert {"--run-dir", "--resume", "--multirun", "--json"} <= set(offered)
    assert complete(script, "apertus-nemo data build --fo") == ["--format", "--force"]


def test_overrides(script: Path) -> None:
    # bash takes "=" for a border between words, so the part behind it is what it wants.
    offered = {word.removeprefix("parallel=") for word in complete(script, "apertus-nemo train parallel=tp")}
    assert {"tp2", "tp2_sp", "tp2_dp2"} <= offered
    assert {"optim.beta1=", "optim.beta2=", "optim.beta3="} <= set(complete(script, "apertus-nemo show optim.beta"))


def test_recipes_of_the_user(script: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("")
    offered = complete(script, f"apertus-nemo train --recipes {tmp_path} recipe=m")
    assert [word.removeprefix("recipe=") for word in offered] == ["mine"]


def test_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert complete(script, "apertus-nemo verify ru", folder=tmp_path) == ["runs/"]


def test_fast_and_light() -> None:
    """Answering imports neither torch nor NeMo."""
    asks = (
        "import os, sys\nfrom apertus_nemo.cli.completion import answer\n"
        "try:\n answer('apertus-nemo train optim.')\nexcept BaseException: pass\n"
        "print(sorted({'torch', 'nemo', 'megatron'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", asks], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    output = capsys.readouterr()
    assert "apertus-nemo" in output.out
    assert output.err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_parser(verb: str) -> None:
    """Completion, and the test of the pages, read it."""
    assert import_module(VERBS[verb][0]).parser().prog == f"apertus-nemo {verb}"
