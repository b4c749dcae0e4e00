"""`apertus-nemo compare A B`; see docs/compare.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """0 identical, 1 different. A broken record leaves as InputError, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    from apertus_nemo.audit.compare import compare
    from apertus_nemo.audit.report import text, tree

    result = compare(options.a, options.b)
    print(json.dumps(tree(result), indent=2, sort_keys=True) if options.json else text(result))
    return result.exit_code


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo compare",
        **explained(
            "Compare the records of two runs: identical, or the first differing step, value and tensor.",
            examples={
                "apertus-nemo compare runs/a runs/b": "",
                "apertus-nemo compare s3://bucket/runs/a runs/b --json": "a copy, read where it lies",
            },
            exit_codes={
                0: "identical",
                1: "different: the first difference is named",
                2: "not a run directory, or a broken record",
                3: "an URL that cannot be reached, or wants a package that is not installed",
            },
        ),
    )
    parser.add_argument("a", metavar="A", help="run directory, or the URL of a copy")
    parser.add_argument("b", metavar="B", help="run directory, or the URL of a copy")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
