"""`apertus-nemo verify RUN`; see docs/verify.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """0 whole, 1 changed. What is no record leaves as InputError, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    from apertus_nemo.audit.verify import verify
    from apertus_nemo.audit.verify_report import text, tree

    result = verify(options.run)
    print(json.dumps(tree(result), indent=2, sort_keys=True) if options.json else text(result))
    return result.exit_code


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo verify",
        **explained(
            "Verify the record of a run: every file is as it was written, and nothing is missing or too much.",
            examples={
                "apertus-nemo verify runs/mine": "",
                "apertus-nemo verify s3://bucket/runs/mine --json": "a copy, read where it lies",
            },
            exit_codes={
                0: "whole, or whole so far",
                1: "changed: each place is named",
                2: "not the record of a run",
                3: "an URL that cannot be reached, or wants a package that is not installed",
            },
        ),
    )
    parser.add_argument("run", metavar="RUN", help="run directory, or the URL of a copy")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
