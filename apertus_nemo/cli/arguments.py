"""What `train` and `show` have in common: a recipe with overrides, and folders of recipes."""

from __future__ import annotations

import argparse
from pathlib import Path

OVERRIDES = """\
overrides, in Hydra's grammar:
  recipe=R            the recipe, a file of recipes/recipe (default: tiny_pretrain)
  optim.lr=2e-3       a value
  parallel=tp2        a file of a config group
  ~optim.beta3        remove what the recipe says; the schema's default is left
"""


def recipe_parser(verb: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser for overrides mixed with options; parse with `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(
        prog=f"apertus-nemo {verb}",
        description=description,
        epilog=OVERRIDES + epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="see below")
    parser.add_argument(
        "--recipes",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a folder laid out like recipes/, searched first; may be given again",
    )
    return parser
