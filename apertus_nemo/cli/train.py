"""`apertus-nemo train`: compose a recipe, check it, and train it on this machine; see docs/train.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import fresh_run_directory, recipe_parser
from apertus_nemo.errors import InputError
from apertus_nemo.recipe import overrides as grammar
from apertus_nemo.recipe.check import check
from apertus_nemo.recipe.compose import ResolvedRecipe, compose, parse_multirun
from apertus_nemo.recipe.time_limit import sets_time_limit

EPILOG = """\
  optim.lr=1e-3,2e-3  with --multirun: one run for each value (also range(), choice(), glob())
"""


def main(arguments: Sequence[str]) -> int:
    """Run the verb; 0 when done. Everything is composed and checked before the first run starts."""
    options = parser().parse_intermixed_args(arguments)
    if options.resume is not None:
        others = [text for text in options.overrides if not sets_time_limit(text)]
        if others or options.recipes or options.run_dir is not None or options.multirun:
            raise InputError(
                "--resume takes everything from the lock of the run: give no recipe, --run-dir or override but "
                "trainer.max_time"
            )
        _train(
            options.overrides,
            options.resume,
            as_json=options.json,
            quiet=options.quiet,
            allow_dirty=options.allow_dirty,
        )
        return 0
    members = _members(options.overrides, options.multirun, options.recipes)
    resolved = [_checked(member, options.recipes, len(members)) for member in members]
    for number, member in enumerate(resolved):
        if len(resolved) > 1 and not options.quiet:
            print(f"run {number + 1} of {len(resolved)}: {' '.join(member.overrides)}", file=sys.stderr, flush=True)
        run_dir = _run_dir(options.run_dir, member, number if len(resolved) > 1 else None)
        _train(member, run_dir, as_json=options.json, quiet=options.quiet, allow_dirty=options.allow_dirty)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = recipe_parser(
        "train",
        "Train a recipe on this machine; go on with a run that was stopped or killed.",
        examples={
            "apertus-nemo train": "a small model on the text that comes with Python, in runs/tiny_pretrain-1",
            "apertus-nemo train optim.lr=2e-3 trainer.max_steps=20 --run-dir runs/mine": "two choices, and a place",
            "apertus-nemo train --resume runs/mine": "go on, at the exact batch",
            "apertus-nemo train optim.lr=1e-3,2e-3 --multirun": "one run for each value",
        },
        exit_codes={
            0: "trained to the last step, or stopped as asked with a checkpoint: the last line says which",
            1: "the data are not what their manifest says, or a step done again is not what was logged",
            2: "the recipe, an override, a folder or the data are wrong; nothing was started",
            3: "this machine cannot do it: disk full, a rank killed or hanging; or a loss that is not finite",
        },
        more=EPILOG,
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="where the run is kept, and goes on if it was begun (default: runs/NAME-N)",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the run in DIR, by its lock alone; trainer.max_time may be another",
    )
    parser.add_argument("--multirun", "-m", action="store_true", help="expand sweeps; each member is a run of its own")
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="train from a checkout with changes; the record keeps them as a patch",
    )
    parser.add_argument("--json", action="store_true", help="report as JSON lines, for machines")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")
    return parser


def _members(overrides: list[str], multirun: bool, recipe_dirs: list[Path]) -> list[tuple[str, ...]]:
    if not multirun and not grammar.wants_multirun(grammar.parse(overrides)):
        return [tuple(overrides)]
    return parse_multirun(overrides, recipe_dirs=recipe_dirs)


def _checked(overrides: tuple[str, ...], recipe_dirs: list[Path], members: int) -> ResolvedRecipe:
    try:
        resolved = compose(overrides=overrides, recipe_dirs=recipe_dirs)
        check(resolved.config)
    except InputError as error:
        if members == 1:
            raise
        raise InputError(f"the member {' '.join(overrides)} of the sweep cannot run:\n{error}") from None
    return resolved


def _run_dir(given: Path | None, resolved: ResolvedRecipe, number: int | None) -> Path:
    """A folder of the run's own; a default one is made here, so that no other process takes its name."""
    if given is not None:
        return given if number is None else given / f"{number:03d}"
    return fresh_run_directory(resolved.config.name)


def _train(
    resolved: ResolvedRecipe | list[str], run_directory: Path, *, as_json: bool, quiet: bool, allow_dirty: bool
) -> None:
    """Train `resolved` in the folder; overrides: go on with what was begun there."""
    from apertus_nemo.launch import local
    from apertus_nemo.launch.resume import give_up
    from apertus_nemo.launch.show import Display

    display = Display(quiet=quiet, as_json=as_json, stream=sys.stdout if as_json else None, environment=os.environ)
    cache = local.default_cache(os.environ)
    try:
        if isinstance(resolved, list):
            summary = local.go_on(run_directory, cache=cache, display=display, overrides=resolved)
        else:
            summary = local.train(resolved, run_directory, cache=cache, display=display, allow_dirty=allow_dirty)
    except BaseException:
        if not isinstance(resolved, list):
            give_up(run_directory)
        raise
    if as_json:
        event = "done" if summary.outcome == "already finished" else summary.outcome
        print(json.dumps({"event": event, **dataclasses.asdict(summary)}), flush=True)
    elif summary.outcome == "stopped":
        again = shlex.join(["apertus-nemo", "train", "--resume", summary.run_directory])
        print(f"stopped after step {summary.steps} of {summary.planned_steps}; go on with: {again}", flush=True)
    elif summary.outcome == "already finished":
        print(f"already finished, {summary.steps} steps, in {summary.run_directory}", flush=True)
    else:
        print(f"{summary.steps} steps, last loss {summary.loss:.4f}, in {summary.run_directory}", flush=True)
