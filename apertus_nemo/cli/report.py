"""`apertus-nemo report RUN [RUN ...]`; see docs/report.md."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """0 when the report is made, whatever it says. Errors leave as ApertusError, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    if options.json and options.output is not None:
        parser().error("--json prints the data; it goes without --output")
    steps = _steps(options.steps)
    from apertus_nemo.report.write import default_place, make, refuse_other_file

    target = None
    if not options.json:
        target = options.output or default_place(options.runs)
        refuse_other_file(target)
    from apertus_nemo.report.gather import gather

    report = gather(options.runs, check=options.verify, steps=steps)
    if target is None:
        print(json.dumps(report, indent=2, sort_keys=True))
        return 0
    size_bytes = make(report, target)
    print(f"{target}: {size_bytes:,} bytes")
    for run in report["runs"]:
        print(f"  {run['label'] + ': ' if len(report['runs']) > 1 else ''}{run['verification']['headline']}")
    for item in report["comparisons"]:
        print(f"  {item['a']} and {item['b']}: {item['headline']}")
    return 0


def _steps(text: str | None) -> tuple[int, int | None]:
    from apertus_nemo.errors import InputError

    if text is None:
        return 1, None
    match = re.fullmatch(r"([0-9]{1,15})-([0-9]{1,15})?", text)
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise InputError(f"--steps {text!r} is no range of steps; write FIRST-LAST, or FIRST- for all from there on")
    return int(match[1]), None if match[2] is None else int(match[2])


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo report",
        **explained(
            "Show a run, or several side by side, in one HTML file that needs no network.",
            examples={
                "apertus-nemo report runs/mine": "writes runs/mine/report.html",
                "apertus-nemo report runs/a runs/b -o both.html": "two, compared",
                "apertus-nemo report runs/mine --steps 1000-2000": "these steps, finer",
            },
            exit_codes={
                0: "made, whatever the verdicts in it",
                2: "not the record of a run, or a file in the way",
                3: "a place that cannot be written or reached, or wants a package that is not installed",
            },
        ),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or the URL of a copy")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the file to write (default: RUN/report.html; of several runs or an URL: report.html)",
    )
    parser.add_argument("--json", action="store_true", help="print the data of the report in its place")
    parser.add_argument(
        "--steps", metavar="FIRST-LAST", help="draw these steps only; what is drawn of a long run is then finer"
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not verify and compare; the report says so",
    )
    return parser
