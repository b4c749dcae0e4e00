"""`apertus-nemo runs [FOLDER ...]`; see docs/runs.md."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained

DEFAULT = Path("runs")


def main(arguments: Sequence[str]) -> int:
    """0 when listed, broken ones included. A folder that is not there leaves as InputError."""
    options = parser().parse_args(arguments)
    from apertus_nemo.audit.status import find_runs, look, to_json
    from apertus_nemo.audit.status_table import table

    folders = options.folders or ([DEFAULT] if DEFAULT.is_dir() else [])
    found = list(look(find_runs(folders)))
    if options.json:
        print(to_json(found))
    elif found:
        print(table(found, width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    else:
        print(f"no runs in {', '.join(map(str, folders or [DEFAULT]))}", file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo runs",
        **explained(
            "List runs: how each does, how far it is, and what went wrong last.",
            examples={
                "apertus-nemo runs": "those in the folder runs",
                "apertus-nemo runs runs/mine sweeps --json": "one, and those of another folder",
            },
            exit_codes={0: "listed, also those that cannot be read, also none", 2: "a folder is not there"},
        ),
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="run directories, or folders that hold some (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    return parser
