"""Every verb and subcommand of the command, with its parser, for tests of what is said about them."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from importlib import import_module

from apertus_nemo.cli.main import VERBS, main


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers below a parser; empty for a verb that has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """What stands behind `apertus-nemo`, such as "train" and "data build", and its parser."""
    found = {}
    for verb, (module, _) in VERBS.items():
        parser = import_module(module).parser()
        found[verb] = parser
        found |= {f"{verb} {name}": part for name, part in subcommands(parser).items()}
    return found


def options(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """The spellings of each option, or the one name of a positional argument; hidden ones and --help are left out."""
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        if action.option_strings:
            yield list(action.option_strings)
        elif isinstance(action.metavar, str):
            yield [action.metavar]
        else:
            yield list(action.choices or [action.dest])


def help_of(verb: str) -> str:
    """What `apertus-nemo VERB --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*verb.split(), "--help"]) == 0
    return printed.getvalue()


def command_lines(text: str) -> list[str]:
    """The calls of `apertus-nemo` in a line of a shell: behind a prompt, inside $(...), without redirection."""
    text = re.sub(r"\s#\s.*", "", text.strip().removeprefix("$ "))
    return [
        re.split(r"\s(?:[|&;<>]|2>)", call)[0].strip()
        for call in re.findall(r"(?:^|[(;&|]\s*)(apertus-nemo [^)]*?)(?=\)|;|&&|$)", text)
    ]


def parses(call: str, known: dict[str, argparse.ArgumentParser]) -> str | None:
    """Why the verb's own parser refuses a call; None where it takes it."""
    words = shlex.split(call)[1:]
    if not words or words[0] in ("--help", "--version", "help"):
        return None
    if words[0] not in VERBS:
        return f"{words[0]} is no verb"
    verb = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    parser, rest = known[verb], words[len(verb.split()) :]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            (parser.parse_args if subcommands(parser) else parser.parse_intermixed_args)(rest)
    except SystemExit as stop:
        return None if stop.code == 0 else errors.getvalue().splitlines()[-1]
    return None
