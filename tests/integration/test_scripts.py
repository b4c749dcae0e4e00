"""What scripts/ says to a machine that cannot do it, in a checkout of its own; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "env", "dirname", "uname", "df", "awk", "sed", "cat", "ls", "rm", "touch", "sha256sum", "cut", "flock")


class Machine:
    """A checkout without an environment, and a PATH that holds the few tools that the scripts use."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("scripts", "requirements"):
            shutil.copytree(ROOT / name, self.checkout / name)
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    def put(self, name: str, script: str) -> None:
        """A program on the PATH."""
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *command: str) -> tuple[int, str, str]:
        """Exit code, output and errors of a script."""
        environment = {"PATH": str(self.bin), "HOME": str(self.checkout)}
        result = subprocess.run(
            [str(self.checkout / command[0]), *command[1:]],
            cwd=self.checkout.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.returncode, result.stdout, result.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", "scripts/lock"])
def test_help(machine: Machine, script: str) -> None:
    code, output, errors = machine.run(script, "--help")
    assert (code, errors) == (0, "")
    assert script in output
    assert "set -euo" not in output


def test_an_unknown_option(machine: Machine) -> None:
    assert machine.run("scripts/quickstart", "--al") == (
        2,
        "",
        "error: there is no option --al; scripts/quickstart --help lists them\n",
    )


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test"])
def test_no_python(machine: Machine, script: str) -> None:
    machine.put("python3.11", "exit 127")  # a shim with nothing behind it
    machine.put("python3", 'exit 1 # "another version"')
    code, _, errors = machine.run(script)
    assert code == 3
    assert errors.startswith("error: no Python 3.11 found; as root: apt-get install python3.11 python3.11-venv")
    assert errors.count("\n") == 1


def test_python_without_venv(machine: Machine) -> None:
    machine.put("python3.11", f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    code, _, errors = machine.run("scripts/quickstart")
    assert code == 3
    assert errors == (
        f"error: {machine.bin}/python3.11 has no venv module; "
        "as root: apt-get install python3.11-venv, then type this again\n"
    )


def test_a_foreign_environment_is_left_alone(machine: Machine) -> None:
    (machine.checkout / ".venv").mkdir()
    (machine.checkout / ".venv" / "mine").touch()
    code, _, errors = machine.run("scripts/quickstart")
    assert code == 2
    assert "is there already, and not made by this: move it away" in errors
    assert os.listdir(machine.checkout / ".venv") == ["mine"]


def test_an_unknown_processor(machine: Machine) -> None:
    (machine.bin / "uname").unlink()
    machine.put("uname", '[ "$1" = -m ] && echo riscv64 || echo Linux')
    code, _, errors = machine.run("scripts/quickstart")
    assert (code, errors) == (3, "error: this processor is riscv64: the locks are for x86_64 and aarch64\n")


def test_a_small_machine_is_told(machine: Machine) -> None:
    (machine.bin / "df").unlink()
    machine.put("df", "printf 'Filesystem\\nx 0 0 2097152 0 /\\n'")
    _, output, _ = machine.run("scripts/quickstart")
    assert output.startswith("warning: 2048 MiB free in ")
    assert "want 10 GiB" in output
