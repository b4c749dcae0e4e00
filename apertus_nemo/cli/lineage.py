"""`apertus-nemo lineage FOLDER`; see docs/lineage.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """0 walked, 1 a link is contradicted. What is neither run nor folder leaves as InputError."""
    options = parser().parse_args(arguments)
    from apertus_nemo.audit.lineage import lineage
    from apertus_nemo.audit.lineage_report import text, tree

    chain = lineage(options.start, runs=options.runs)
    print(json.dumps(tree(chain), indent=2, sort_keys=True) if options.json else text(chain))
    return chain.exit_code


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo lineage",
        **explained(
            "Walk back from a model to the run that drew its weights, and say where the chain ends, and why.",
            examples={
                "apertus-nemo lineage runs/sft": "from a run",
                "apertus-nemo lineage hf --runs runs": "from an exported folder; runs are looked for there, too",
            },
            exit_codes={
                0: "walked as far as it is known, and no record contradicts another; the first line says how far",
                1: "a link is contradicted: digests differ",
                2: "neither a run directory nor a folder of a model, or one that cannot be read",
            },
        ),
    )
    parser.add_argument(
        "start", type=Path, metavar="FOLDER", help="run directory, or a folder that was exported from one"
    )
    parser.add_argument(
        "--runs",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a run directory, or a folder that holds some, to look for parents in; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="print the chain as JSON")
    return parser
