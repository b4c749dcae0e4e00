"""`apertus-nemo completion SHELL`, and the answers to a shell that completes a line; see docs/completion.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from apertus_nemo.errors import UnfitEnvironment

SHELLS = ("bash", "zsh", "fish")
COMMAND = "apertus-nemo"


def main(arguments: Sequence[str]) -> int:
    """Print the script for a shell; 0 when done."""
    options = parser().parse_args(arguments)
    try:
        from argcomplete.shell_integration import shellcode
    except ModuleNotFoundError:
        raise UnfitEnvironment("the package argcomplete is missing: install the locked requirements") from None
    # zsh reads bash's script, through its own bashcompinit, which the script calls.
    print(shellcode([COMMAND], shell="bash" if options.shell == "zsh" else options.shell))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo completion",
        description="Print a script that completes verbs, options, overrides and files in a shell.",
        epilog='bash, zsh: eval "$(apertus-nemo completion bash)", here or in ~/.bashrc, ~/.zshrc\n'
        "fish:      apertus-nemo completion fish > ~/.config/fish/completions/apertus-nemo.fish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def answer(line: str) -> None:
    """Answer the shell, as argcomplete's protocol has it, and exit; `line` is what was typed.

    Only the verb that stands in the line is imported.
    """
    import argcomplete

    from apertus_nemo.cli.main import VERBS

    whole = argparse.ArgumentParser(prog=COMMAND)
    whole.add_argument("--version", action="store_true")
    verbs = whole.add_subparsers(dest="verb")
    words = line.split()
    for verb, (module, text) in VERBS.items():
        part = verbs.add_parser(verb, help=text)
        if verb in words[1:2]:
            real: argparse.ArgumentParser = import_module(module).parser()
            part.__dict__.update(real.__dict__)  # the verb's own parser in its place
    argcomplete.autocomplete(whole)
