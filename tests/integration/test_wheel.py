"""The wheel works from an empty folder: it carries recipes and locks, and its command finds them there."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> Path:
    """Build the wheel offline, with the backend that is installed here; the wheel's path."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("apertus_nemo-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has put the wheel, without a network and without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    python = sys.executable if importlib.util.find_spec("pip") else sys._base_executable  # type: ignore[attr-defined]
    command = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=120)
    return target


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A working directory with nothing in it."""
    return tmp_path


def run(installed: Path, empty: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run in an empty folder, with the installed wheel before everything else that Python knows."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(empty), "PYTHONPATH": str(installed), "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=120)


def files_below(folder: Path) -> dict[str, bytes]:
    """What git would not ignore, by path relative to the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("name", ["edf", "recipes", "requirements"])
def test_the_wheel_carries(wheel: Path, name: str) -> None:
    prefix = f"apertus_nemo/resources/{name}/"
    with zipfile.ZipFile(wheel) as archive:
        carried = {
            member.removeprefix(prefix): archive.read(member)
            for member in archive.namelist()
            if member.startswith(prefix)
        }
    assert carried == files_below(ROOT / name)
    assert carried


def test_the_wheel_carries_the_package_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = set(archive.namelist())
    modules = {f"apertus_nemo/{path}" for path in files_below(ROOT / "apertus_nemo")}
    assert modules <= members
    assert {member.rsplit("/", 1)[-1] for member in members if "/licenses/" in member} == {"LICENSE", "NOTICE"}
    assert not [member for member in members if member.startswith(("tests/", "benchmarks/", "recipes/"))]


def test_two_builds_are_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, build(tmp_path)))
    assert first == second


def test_it_is_the_wheel_that_runs(installed: Path, empty: Path) -> None:
    result = run(installed, empty, sys.executable, "-c", "import apertus_nemo; print(apertus_nemo.__file__)")
    assert result.stdout.strip() == str(installed / "apertus_nemo" / "__init__.py")


def test_help_from_an_empty_folder(installed: Path, empty: Path) -> None:
    result = run(installed, empty, str(installed / "bin" / "apertus-nemo"), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for verb in ("train", "show", "compare", "data"):
        assert verb in result.stdout
    assert not list(empty.iterdir())


def test_show_finds_the_recipes_in_the_wheel(installed: Path, empty: Path) -> None:
    result = run(installed, empty, str(installed / "bin" / "apertus-nemo"), "show", "recipe=tiny_pretrain")
    assert (result.returncode, result.stderr) == (0, "")
    assert "num_layers" in result.stdout
    assert str(ROOT) not in result.stdout
    assert not list(empty.iterdir())
