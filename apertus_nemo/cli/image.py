"""`apertus-nemo image ...`: finds the subcommand, which is a module that is imported only when it is called.

A subcommand is a module with `main(arguments) -> int` and `parser()`; see docs/image.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

# subcommand -> (module, one line of help)
SUBCOMMANDS = {
    "pull": ("apertus_nemo.cli.image_pull", "bring an image from a registry, checked, as a squashfs file"),
    "check": ("apertus_nemo.cli.image_check", "read every byte of a squashfs file and say whether it is as made"),
    "verify": ("apertus_nemo.cli.image_verify", "run the self-test of an image inside it, on this machine"),
    "inspect": ("apertus_nemo.cli.image_inspect", "print what an image is: digests, platforms, layers, environment"),
    "list": ("apertus_nemo.cli.image_list", "list families and versions: what is in each, for which machine"),
    "diff": ("apertus_nemo.cli.image_diff", "say what changed between two images, and what it may do"),
    "build": ("apertus_nemo.cli.image_build", "build an image from its definition and lock, to the same digest"),
    "publish": ("apertus_nemo.cli.image_publish", "push a built image, with what refers to it, once and for ever"),
    "apptainer": ("apertus_nemo.cli.image_apptainer", "print the definition file of an image for Apptainer"),
    "lock": ("apertus_nemo.cli.image_lock", "resolve a definition: every package, with version and hash"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the verb. Errors leave as `apertus_nemo.errors.ApertusError`, wrong usage as SystemExit(2)."""
    if not arguments:
        sys.stderr.write(usage())
        return 2
    name, *rest = arguments
    if name in ("--help", "-h", "help"):
        sys.stdout.write(usage())
        return 0
    if name not in SUBCOMMANDS:
        from difflib import get_close_matches

        from apertus_nemo.errors import InputError

        near = get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUBCOMMANDS)}"
        raise InputError(f"image: {name!r} is not a subcommand; {hint}")
    from importlib import import_module

    code: int = import_module(SUBCOMMANDS[name][0]).main(rest)
    return code


def parser() -> argparse.ArgumentParser:
    """The options of all subcommands, for completion: every one of them is imported."""
    import argparse
    from importlib import import_module

    whole = argparse.ArgumentParser(prog="apertus-nemo image")
    subcommands = whole.add_subparsers(dest="subcommand")
    for name, (module, text) in SUBCOMMANDS.items():
        part = subcommands.add_parser(name, help=text)
        part.__dict__.update(import_module(module).parser().__dict__)
    return whole


def usage() -> str:
    """The help of the verb itself."""
    width = max(map(len, SUBCOMMANDS))
    lines = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in SUBCOMMANDS.items())
    return f"""usage: apertus-nemo image SUBCOMMAND ...

Container images: what is in them, pinned by digest, and as files that a cluster starts.

subcommands:
{lines}

examples:
  apertus-nemo image pull gh200-1.0.0 --output images
  apertus-nemo image check images/cpu-1.0.0-1da79e64f3b1.sqsh

exit codes:
  0  done
  1  something is not what its digest, its lock or its sidecar says
  2  no such image, or something malformed
  3  a registry or the disk refuses, or a tool is missing

`apertus-nemo image SUBCOMMAND --help` explains one.
"""
