"""`apertus-nemo logs RUN`; see docs/logs.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apertus_nemo.cli.arguments import explained

if TYPE_CHECKING:
    from apertus_nemo.audit.rank_logs import Ended, Line


def main(arguments: Sequence[str]) -> int:
    """0 when printed, or when a run that was followed has ended. No such run, attempt or rank: InputError."""
    options = parser().parse_args(arguments)
    from apertus_nemo.audit.rank_logs import follow, read_logs

    items: Iterator[Line | Ended]
    if options.follow:
        items = follow(
            options.run, attempt=options.attempt, rank=options.rank, last_lines=options.lines, wait_s=options.wait
        )
    else:
        items = iter(read_logs(options.run, attempt=options.attempt, rank=options.rank, last_lines=options.lines))
    (_print_json if options.json else _print)(items, options.follow)
    return 0


def _print(items: Iterator[Line | Ended], following: bool) -> None:
    """The lines as they were written, under a heading for each log; interleaved ones name their rank each time."""
    from apertus_nemo.audit.rank_logs import Ended

    last: tuple[int, int] | None = None
    for item in items:
        if isinstance(item, Ended):
            print(f"attempt {item.attempt}: {item.cause}: {_plain(item.message)}", file=sys.stderr)
            return
        if (item.attempt, item.rank) != last:
            last = (item.attempt, item.rank)
            print(f"==> attempt {item.attempt}, rank {item.rank} <==")
        print(item.text, flush=following)


def _print_json(items: Iterator[Line | Ended], following: bool) -> None:
    """A JSON object a line."""
    from apertus_nemo.audit.rank_logs import Ended

    for item in items:
        if isinstance(item, Ended):
            tree = {"attempt": item.attempt, "cause": item.cause, "event": "ended", "message": item.message}
        else:
            tree = {"attempt": item.attempt, "event": "line", "rank": item.rank, "text": item.text}
        print(json.dumps(tree), flush=following)


def _plain(text: str) -> str:
    from apertus_nemo.record.places import printable

    return printable(text)


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo logs",
        **explained(
            "Print what the ranks of a run wrote, by attempt and rank.",
            examples={
                "apertus-nemo logs runs/mine -n 20": "the last lines of each rank, of the last attempt",
                "apertus-nemo logs runs/mine --attempt 0 --rank 1": "",
                "apertus-nemo logs runs/mine --follow": "as lines come, until the run ends",
            },
            exit_codes={
                0: "printed; a run that was followed has ended, however it did",
                2: "there is no such run, attempt or rank",
            },
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--attempt", type=_count, metavar="N", help="of this attempt, from 0 (default: the last one)")
    parser.add_argument("--rank", type=_count, metavar="R", help="of this rank alone")
    parser.add_argument("--follow", "-f", action="store_true", help="go on as lines come, until the run ends")
    parser.add_argument(
        "--lines", "-n", type=_count, metavar="LINES", help="begin with the last LINES of each rank (default: all)"
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="with --follow: how many seconds to wait for another attempt after one that failed (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    return parser


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0")
    return value
