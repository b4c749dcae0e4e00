"""docs/tutorial.md as a reader types it: its commands run in bash, in order, and print what the page says."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.command import ROOT

PAGE = ROOT / "docs" / "tutorial.md"
LIMIT_S = 480


def sessions(text: str) -> list[tuple[str, str]]:
    """The commands of the ```console blocks, each with what it must print; lines behind "> " go on with a command."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        assert block.startswith("$ "), block
        for piece in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            first, *lines = piece.splitlines()
            more = [line for line in lines if line == ">" or line.startswith("> ")]
            assert lines[: len(more)] == more, piece
            expected = "".join(line + "\n" for line in lines[len(more) :])
            found.append(("\n".join([first, *(line[2:] for line in more)]), expected))
    return found


def script(commands: list[str]) -> str:
    """All commands in one shell; a line with the number and exit code of each, behind what it printed.

    `disown`, since a shell that is no terminal prints a line of its own about a job that was killed.
    """
    parts = [
        f"{{\n{command}\n}} 2>&1\nlast=$?\nprintf '\\n@@%d %d\\n' {number} $last\ndisown -a\n(exit $last)\n"
        for number, command in enumerate(commands)
    ]
    return "".join(parts)


def read(output: str) -> list[tuple[int, str]]:
    """Exit code and output of each command."""
    pieces = re.split(r"\n@@(\d+) (\d+)\n", output)
    return [(int(pieces[at + 2]), pieces[at]) for at in range(0, len(pieces) - 2, 3)]


def faults(wanted: list[tuple[str, str]], printed: list[tuple[int, str]]) -> list[str]:
    """Where the commands did not do what the page says."""
    found = []
    checker = doctest.OutputChecker()
    asks = [command == "echo $?" for command, _ in wanted[1:]] + [False]
    for (command, expected), (code, got), asked in zip(wanted, printed, asks, strict=False):
        got = got if not got or got.endswith("\n") else got + "\n"
        if not checker.check_output(expected, got, doctest.ELLIPSIS):
            found.append(f"$ {command}\n--- the page says\n{expected}--- it printed\n{got}")
        if code and not asked:
            found.append(f"$ {command}\n--- ended with {code}, which the page does not show\n{got}")
    if len(printed) != len(wanted):
        found.append(f"{len(printed)} of {len(wanted)} commands ran")
    return found


def reader(folder: Path) -> dict[str, str]:
    """The environment of somebody who has done what the page says under "Set up"."""
    programs = folder / "bin"
    programs.mkdir()
    # the checkout under test may have changes: `train` is told to keep them
    (programs / "apertus-nemo").write_text(
        f'#!/bin/sh\n[ "$1" = train ] && shift && set -- train --allow-dirty "$@"\n'
        f'exec {sys.executable} -m apertus_nemo.cli.main "$@"\n'
    )
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (folder / "home").mkdir()
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.mark.full
@pytest.mark.timeout(LIMIT_S + 20)
def test_the_tutorial_is_what_happens(tmp_path: Path) -> None:
    wanted = sessions(PAGE.read_text())
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        ["bash", "--norc"],
        input=script([command for command, _ in wanted]),
        cwd=work,
        env=reader(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert not (found := faults(wanted, read(done.stdout))), "\n".join(found)


def test_what_differs_would_be_found(tmp_path: Path) -> None:
    """The reader of the page, on a page of its own."""
    page = (
        "```console\n$ printf 'a\\nb\\n'\na\n...\n$ false\n$ echo $?\n1\n$ cat <<'E'\n> two\n> E\ntwo\n```\n"
        "```sh\nnot run\n```\n```console\n$ x=1\n```\n```console\n$ echo $x; cat no-such-file\n1\n"
        "cat: no-such-file: ...\n$ echo $?\n1\n```\n"
    )

    def faults_of(page: str) -> list[str]:
        wanted = sessions(page)
        done = subprocess.run(
            ["bash", "--norc"],
            input=script([command for command, _ in wanted]),
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        return faults(wanted, read(done.stdout))

    assert len(sessions(page)) == 7
    assert faults_of(page) == []
    assert len(faults_of(page.replace("two\n```", "three\n```"))) == 1
    assert len(faults_of(page.replace("$ false\n$ echo $?\n1\n", "$ false\n"))) == 1
    assert len(faults_of(page.replace("$ x=1", "$ exit 0"))) == 1
