"""What `train` and `show` have in common: a recipe with overrides, and folders of recipes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    words = parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="see below")
    words.completer = overrides  # type: ignore[attr-defined]  # argcomplete reads it
    parser.add_argument(
        "--recipes",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a folder laid out like recipes/, searched first; may be given again",
    )
    return parser


def overrides(prefix: str, parsed_args: argparse.Namespace, **_more: Any) -> Iterator[str]:
    """What an override that begins with `prefix` may go on as: files of groups, and keys of the schema.

    For completion in a shell: it looks at names only, and composes nothing.
    """
    from apertus_nemo.recipe.locate import packaged_recipes

    recipe_dirs = [*(getattr(parsed_args, "recipes", None) or []), packaged_recipes()]
    group, equals, _ = prefix.partition("=")
    for folder in recipe_dirs:
        for place in sorted(path for path in folder.glob("*") if path.is_dir()):
            if equals and place.name == group:
                yield from (f"{group}={file.stem}" for file in sorted(place.glob("*.yaml")))
            elif not equals:
                yield f"{place.name}="
    if not equals:
        yield from _keys()


def _keys() -> Iterator[str]:
    import dataclasses
    import typing

    from apertus_nemo.recipe.schema import RunConfig

    sections = typing.get_type_hints(RunConfig)
    for name, kind in sections.items():
        if dataclasses.is_dataclass(kind):
            yield from (f"{name}.{field.name}=" for field in dataclasses.fields(kind))
