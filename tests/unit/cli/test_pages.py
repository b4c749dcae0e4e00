"""The pages of docs/: one shape for every verb, no option or exit code that it does not have, and none left out.

A verb's page is `docs/VERB.md`: its name, how it is called, what it does, a section for options and one for exit codes.
Subcommands are sections of the page, each with the same two below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from apertus_nemo.cli.main import VERBS, main
from tests.unit.cli.verbs import command_lines, help_of, options, parsers, parses, subcommands

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PARSERS = parsers()
COMMANDS = [name for name, parser in PARSERS.items() if not subcommands(parser)]
TEXTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
OF_EVERY_COMMAND = {4, 129, 130, 143}  # our own fault, and signals: said where they matter


def section(text: str, heading: str) -> str:
    """What stands below `heading`, up to the next one of its level or above; AssertionError where there is none."""
    level = len(heading.split()[0])
    parts = re.split(rf"^{re.escape(heading)}\n", text, flags=re.MULTILINE)
    assert len(parts) == 2, f"{heading!r} stands {len(parts) - 1} times"
    return re.split(rf"^#{{1,{level}}} ", parts[1], maxsplit=1, flags=re.MULTILINE)[0]


def page(command: str) -> tuple[str, str]:
    """What the page says of a command, and the heading marks of its sections."""
    verb, *rest = command.split()
    text = (DOCS / f"{verb}.md").read_text()
    return (section(text, f"## {rest[0]}"), "###") if rest else (text, "##")


def first_cells(table: str, head: str) -> Iterator[str]:
    """The first column of the table whose head begins with `head`."""
    lines = table[table.index(f"| {head} | |\n|---|---|\n") :].splitlines()[2:]
    for line in lines:
        if not line.startswith("| "):
            return
        yield re.split(r"(?<!\\)\|", line)[1].strip()


def indented(text: str) -> list[str]:
    """The lines of indented blocks, those that end in a backslash joined with the next."""
    joined = re.sub(r" *\\\n +", " ", text)
    return [line[4:] for line in joined.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_begins_with_how_the_verb_is_called(verb: str) -> None:
    text = (DOCS / f"{verb}.md").read_text()
    head, synopsis, what, *_ = text.split("\n\n")
    assert head == f"# apertus-nemo {verb}"
    assert not what.startswith(("#", "|", " "))
    assert all(line.startswith("    ") for line in synopsis.splitlines())
    calls = [" ".join(call.split()) for call in re.split(r"^    (?=\S)", synopsis, flags=re.MULTILINE) if call]
    of_verb = [name for name in COMMANDS if name.split()[0] == verb]
    for name in of_verb:
        mine = " ".join(call for call in calls if f"{call} ".startswith(f"apertus-nemo {name} "))
        assert mine, name
        said = set(re.findall(r"(?<![\w-])--[\w-]+", mine))
        long = {spelling for option in options(PARSERS[name]) for spelling in option if spelling.startswith("--")}
        assert said == long, f"{name}: {sorted(said ^ long)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_has_its_row_and_no_other(command: str) -> None:
    text, marks = page(command)
    named: set[str] = set()
    for cell in first_cells(section(text, f"{marks} Options"), "option"):
        quoted = re.findall(r"`([^`]+)`", cell)
        assert quoted, cell
        named |= {words.split()[0] for words in quoted}
    has = {spelling for option in options(PARSERS[command]) for spelling in option}
    assert named == has, f"not on the page: {sorted(has - named)}; of no verb: {sorted(named - has)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_codes_are_those_of_the_help(command: str) -> None:
    text, marks = page(command)
    codes = [int(cell) for cell in first_cells(section(text, f"{marks} Exit codes"), "exit code")]
    assert codes == sorted(set(codes))
    helped = help_of(command).split("exit codes:\n")[1]
    assert set(codes) - OF_EVERY_COMMAND == {int(line.split()[0]) for line in helped.splitlines() if line.strip()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_shows_how_it_is_used(command: str) -> None:
    text = (DOCS / f"{command.split()[0]}.md").read_text().split("\n\n", 2)[2]
    calls = [call for line in indented(text) for call in command_lines(line)]
    assert [call for call in calls if f"{call} ".startswith(f"apertus-nemo {command} ")] != []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_in_a_text_are_taken_by_their_verbs(path: Path) -> None:
    text = path.read_text()
    if path.stem in VERBS:
        text = text.split("\n\n", 2)[2]  # the synopsis is no example
    code = [
        line
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    for line in [*indented(text), *code]:
        for call in command_lines(line):
            if "..." not in call:
                assert parses(call.replace("<TAB>", ""), PARSERS) is None, f"{path.name}: {call}"
    for words in re.findall(r"`apertus-nemo (\w[^`]*)`", text):
        verb, *rest = words.split()
        assert verb == "VERB" or verb in VERBS, f"{path.name}: {words}"
        if rest and subcommands(PARSERS[verb]):
            assert f"{verb} {rest[0]}" in PARSERS, f"{path.name}: {words}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [verb for verb in VERBS if f"apertus-nemo {verb}" not in text]
    assert missing == []


def test_output_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "plan.md").read_text()
    block = text[text.index("    $ apertus-nemo plan ") : text.index("\n## Options")]
    first, *_ = indented(block)
    (call,) = command_lines(first)
    assert main(call.split()[1:]) == 0
    printed = "".join(f"    {line}".rstrip() + "\n" for line in capsys.readouterr().out.splitlines())
    assert block.endswith(f"\n{printed}")
