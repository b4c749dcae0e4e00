"""`apertus-nemo plan`: what a run will need and do, before the queue; see docs/plan.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apertus_nemo.cli.arguments import recipe_parser
from apertus_nemo.errors import ApertusError, InputError

if TYPE_CHECKING:
    from apertus_nemo.recipe.schema import RunConfig


def main(arguments: Sequence[str]) -> int:
    """0 it can work; 2 it cannot: the plan is printed, then why not."""
    options = parser().parse_intermixed_args(arguments)
    from apertus_nemo.plan.plan import Assumptions, plan
    from apertus_nemo.plan.ranks import place
    from apertus_nemo.plan.text import text
    from apertus_nemo.recipe.check import check
    from apertus_nemo.recipe.compose import compose

    composed = compose(overrides=options.overrides, recipe_dirs=options.recipes, stand_ins=True)
    run = composed.config
    check(run)
    ranks = [place(run, rank).rank for rank in options.build]
    assumptions = Assumptions(
        accelerator=options.gpu,
        tokens_per_s_per_gpu=options.tokens_per_s,
        mfu=options.mfu,
        checkpoint_s=options.checkpoint_s,
        mean_time_between_failures_s=None if options.mtbf_h is None else options.mtbf_h * 3600,
    )
    tree = {**plan(run, assumptions), "open": list(composed.open)}
    if ranks:
        tree["built"] = _build(run, ranks)
    print(json.dumps(tree, indent=2, sort_keys=True) if options.json else text(tree), flush=True)
    wrong = [row for row in tree.get("built", []) if not row["agrees"]]
    if wrong:
        raise ApertusError(f"what was built of rank {wrong[0]['rank']} is not what the plan counts")
    if tree["refused"]:
        raise InputError("\n".join(f"{run.name} cannot work: {line}" for line in tree["refused"]))
    return 0


def _build(run: RunConfig, ranks: list[int]) -> list[dict[str, Any]]:
    """Megatron's own model of these ranks, as shapes, beside what the plan counts."""
    print(
        f"importing Megatron-core, then building {len(ranks)} of {run.world_size:,} ranks", file=sys.stderr, flush=True
    )
    from apertus_nemo.training import imports

    imports.install()
    import logging
    import warnings

    warnings.filterwarnings("ignore")  # what imported packages say to their own developers
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from apertus_nemo.plan.build import compare

    return [compare(run, rank) for rank in ranks]


def _ranks(text: str) -> list[int]:
    try:
        ranks = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"ranks are numbers with commas between them, and {text!r} is not") from None
    return sorted(set(ranks))


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = recipe_parser(
        "plan",
        "Say what a run will need and do, before the queue; nothing is started.",
        examples={
            "apertus-nemo plan": "of the default recipe",
            "apertus-nemo plan model=apertus_8b parallel=apertus_8b trainer=gpu trainer.devices=4": "8B on four GPUs",
            "apertus-nemo plan parallel=tp2 --build 0,1": "Megatron's own model of two ranks, held against the plan",
        },
        exit_codes={
            0: "it can work",
            2: "it cannot: the recipe is refused, or the plan is printed and then why it cannot work",
            3: "--build: a package is missing",
        },
    )
    parser.add_argument("--gpu", default="gh200", metavar="NAME", help="gh200 (default) or h100")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--tokens-per-s", type=float, metavar="N", help="throughput of one GPU: adds time and energy")
    speed.add_argument("--mfu", type=float, metavar="SHARE", help="or the share of the GPU's peak that is reached")
    parser.add_argument("--checkpoint-s", type=float, metavar="S", help="how long a checkpoint holds the run up")
    parser.add_argument("--mtbf-h", type=float, metavar="H", help="hours between failures of the whole job, on average")
    parser.add_argument(
        "--build",
        type=_ranks,
        default=[],
        metavar="RANKS",
        help="build Megatron's model of these ranks (0,4095), as shapes, and hold it against the plan",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    return parser
