"""The help: every verb in one group, and each with a purpose, examples that its parser takes, and its exit codes."""

from __future__ import annotations

import re

import pytest

from apertus_nemo.cli.main import GROUPS, VERBS, usage
from tests.unit.cli.verbs import command_lines, help_of, parsers, parses

PARSERS = parsers()
WIDTH = 110  # columns


def test_each_verb_is_in_one_group() -> None:
    grouped = [verb for group in GROUPS.values() for verb in group]
    assert sorted(grouped) == sorted(set(grouped)) == sorted(VERBS)


def test_the_help_names_each_verb_once_below_its_group() -> None:
    text = usage()
    found: dict[str, list[str]] = {}
    for paragraph in text.split("\n\n"):
        heading, *lines = paragraph.splitlines()
        found[heading.removesuffix(":")] = [line.split()[0] for line in lines]
    assert {what: found.get(what) for what in GROUPS} == {what: list(group) for what, group in GROUPS.items()}
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []
    for line in text.split("begin with:\n")[1].split("\n\n")[0].splitlines():
        call = re.split(r"\s{2,}", line.strip())[0]
        assert parses(call, PARSERS) is None, call


@pytest.mark.parametrize("verb", PARSERS)
def test_a_verb_says_what_it_is_for_how_it_is_used_and_how_it_ends(verb: str) -> None:
    text = help_of(verb)
    paragraphs = text.split("\n\n")
    assert paragraphs[0].startswith(f"usage: apertus-nemo {verb}")
    purpose = paragraphs[1]
    assert "\n" not in purpose
    assert purpose.endswith(".")
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []

    (examples,) = (part.splitlines()[1:] for part in paragraphs if part.startswith("examples:\n"))
    calls = [call for line in examples for call in command_lines(line)]
    assert len(calls) == len([line for line in examples if not line.startswith("  # ")]) > 0
    for call in calls:
        assert call.startswith(f"apertus-nemo {verb}"), call
        assert parses(call, PARSERS) is None, call

    (codes,) = (part.splitlines()[1:] for part in paragraphs if part.startswith("exit codes:\n"))
    numbers = [int(line.split()[0]) for line in codes]
    assert numbers == sorted(set(numbers))
    assert {0, 2} <= set(numbers) <= {0, 1, 2, 3, 4}


def test_a_wrong_example_would_be_found() -> None:
    assert parses("apertus-nemo compare runs/a", PARSERS) is not None
    assert parses("apertus-nemo train --resumes runs/a", PARSERS) is not None
    assert parses("apertus-nemo data make", PARSERS) is not None
    assert command_lines('eval "$(apertus-nemo completion bash)"') == ["apertus-nemo completion bash"]
    assert command_lines("  $ apertus-nemo runs | head  # a few") == ["apertus-nemo runs"]


@pytest.mark.parametrize(("words", "same_as"), [("help compare", "compare"), ("help data build", "data build")])
def test_help_before_the_verb(words: str, same_as: str, capsys: pytest.CaptureFixture[str]) -> None:
    from apertus_nemo.cli.main import main

    assert main(words.split()) == 0
    assert capsys.readouterr().out == help_of(same_as)
