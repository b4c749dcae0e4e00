"""The command: verbs, exit codes, and what reaches the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import apertus_nemo
from apertus_nemo import errors
from apertus_nemo.cli import main as module
from apertus_nemo.cli.main import VERBS, main

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "apertus_nemo.cli.main", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        **options,  # type: ignore[call-overload]
    )


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main(["-h"]) == main(["help"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    width = max(map(len, VERBS))
    for verb, (_, text) in VERBS.items():
        assert f"  {verb:{width}}  {text}\n" in output.out


def test_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.splitlines()[0]) == ("", "usage: apertus-nemo VERB [ARGUMENT ...]")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"apertus-nemo {apertus_nemo.__version__}\n"


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("trin", "apertus-nemo: 'trin' is not a verb; did you mean train?\n"),
        ("quux", f"apertus-nemo: 'quux' is not a verb; there are {', '.join(VERBS)}\n"),
        ("--verbose", f"apertus-nemo: '--verbose' is not a verb; there are {', '.join(VERBS)}\n"),
    ],
)
def test_unknown_verb(verb: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: apertus-nemo {verb}")


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_usage(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--no-such-option"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A verb that raises what the test puts there."""
    verb = types.ModuleType("tests.a_verb")
    monkeypatch.setitem(sys.modules, "tests.a_verb", verb)
    monkeypatch.setitem(module.VERBS, "raise", ("tests.a_verb", ""))
    return verb


def raise_(error: BaseException) -> object:
    def call(_: object) -> int:
        raise error

    return call


@pytest.mark.parametrize(("error", "code"), [(errors.Differs, 1), (errors.InputError, 2), (errors.UnfitEnvironment, 3)])
def test_errors_for_the_user(
    error: type[errors.ApertusError], code: int, raising: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    raising.main = raise_(error("first\nsecond"))  # type: ignore[attr-defined]
    assert main(["raise"]) == code
    assert capsys.readouterr().err == "apertus-nemo: first\napertus-nemo: second\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), errors.ApertusError("broken"), AssertionError()])
def test_our_own_fault(error: Exception, raising: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    raising.main = raise_(error)  # type: ignore[attr-defined]
    assert main(["raise"]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "apertus-nemo: this is a fault of apertus-nemo itself; please report the lines above"


def test_interrupted(raising: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    raising.main = raise_(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert main(["raise"]) == 130
    assert capsys.readouterr().err == ""


def test_reader_goes_away() -> None:
    """`apertus-nemo show | head -0`: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        process = subprocess.run(
            [sys.executable, "-m", "apertus_nemo.cli.main", "--help"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert (process.returncode, process.stderr) == (141, b"")


def test_names_that_are_not_text(tmp_path: Path) -> None:
    """A folder whose name is not UTF-8, on a terminal that knows ASCII only."""
    folder = os.fsdecode(b"r\xff\xe9")
    (tmp_path / folder / "model").mkdir(parents=True)
    (tmp_path / folder / "model" / "tiny.yaml").write_text("num_layers: 2\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "apertus_nemo.cli.main", "show", "--recipes", folder],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert b"model.hidden_size has no value" in done.stderr
    assert b"Traceback" not in done.stderr


PROBE = """
import sys
from apertus_nemo.cli.main import main
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[1:])
print(code, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(("arguments", "light"), [(["--help"], True), (["show", "parallel=tp2"], False)])
def test_nothing_heavy_is_imported(arguments: list[str], light: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    code, *modules = done.stdout.split()
    assert code == "0"
    heavy = {"torch", "numpy", "nemo", "megatron", "lightning", "transformers", "pandas"}
    heavy |= {"hydra", "omegaconf", "yaml", "argparse", "dataclasses"} if light else set()
    assert heavy & set(modules) == set()
    assert os.listdir(tmp_path) == []
