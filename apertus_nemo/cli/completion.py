"""`apertus-nemo completion SHELL`, and the answers to a shell that completes a line; see docs/completion.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from apertus_nemo.cli.arguments import explained
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
        **explained(
            "Print a script that completes verbs, options, overrides and files in a shell.",
            examples={
                'eval "$(apertus-nemo completion bash)"': "bash; in ~/.bashrc for every shell",
                'eval "$(apertus-nemo completion zsh)"': "zsh; in ~/.zshrc",
                "apertus-nemo completion fish > ~/.config/fish/completions/apertus-nemo.fish": "fish",
            },
            exit_codes={0: "printed", 2: "not one of these shells", 3: "the package argcomplete is missing"},
        ),
    )
    parser.add_argument("shell", choices=SHELLS, help="the one that will read it")
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
