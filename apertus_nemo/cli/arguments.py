"""What the verbs have in common: help of one shape, and for some a recipe with overrides.

    parser = argparse.ArgumentParser(
        prog="apertus-nemo compare",
        **explained(
            "Compare the records of two runs.",
            examples={"apertus-nemo compare runs/a runs/b": "identical, or what differs first"},
            exit_codes={0: "identical", 1: "different"},
        ),
    )

`tests/unit/cli/test_help.py` parses every example, and holds options and exit codes against the page of the verb.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError

OVERRIDES = """\
overrides, in Hydra's grammar:
  recipe=R            the recipe, a file of recipes/recipe (default: tiny_pretrain)
  optim.lr=2e-3       a value
  parallel=tp2        a file of a config group
  ~optim.beta3        remove what the recipe says; the schema's default is left
"""


def explained(
    purpose: str, *, examples: Mapping[str, str], exit_codes: Mapping[int, str], more: str = ""
) -> dict[str, Any]:
    """What an `ArgumentParser` is made with, so that its help has one shape.

    `examples` holds command lines, each with what it does; `exit_codes` what each means; `more` stands before both.
    """
    lines = [
        line for command, what in examples.items() for line in ([f"  # {what}"] if what else []) + [f"  {command}"]
    ]
    codes = [f"  {code}  {meaning}" for code, meaning in exit_codes.items()]
    parts = [more.strip("\n"), "\n".join(["examples:", *lines]), "\n".join(["exit codes:", *codes])]
    return {
        "description": purpose,
        "epilog": "\n\n".join(part for part in parts if part),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def recipe_parser(
    verb: str, purpose: str, *, examples: Mapping[str, str], exit_codes: Mapping[int, str], more: str = ""
) -> argparse.ArgumentParser:
    """A parser for overrides mixed with options; parse with `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(
        prog=f"apertus-nemo {verb}",
        **explained(purpose, examples=examples, exit_codes=exit_codes, more=OVERRIDES + more),
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


def fresh_run_directory(name: str) -> Path:
    """Make `runs/NAME-N` with the first free number, which no other process then takes. Raises InputError."""
    count = 1
    while True:
        folder = Path("runs") / f"{name}-{count}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1
        except OSError as error:
            raise InputError(f"{folder} cannot be made ({error.strerror}); give another place with --run-dir") from None


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
