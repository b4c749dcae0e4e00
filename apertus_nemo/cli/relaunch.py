"""`apertus-nemo relaunch RUN`: do a run again from its record alone, and prove it; see docs/relaunch.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apertus_nemo.cli.arguments import explained, fresh_run_directory
from apertus_nemo.errors import InputError


def main(arguments: Sequence[str]) -> int:
    """0 identical, 1 different; 2 a broken record or wrong usage, 3 refused: something pinned is not as it was."""
    options = parser().parse_args(arguments)
    from apertus_nemo.audit.relaunch import Record, Refused
    from apertus_nemo.launch.resume import give_up

    record = Record.read(options.run)
    run_directory = _run_dir(options.run_dir, record.lock.tree["config"])
    try:
        code = _train(options, record, run_directory)
    except BaseException as error:
        give_up(run_directory)
        if options.json and isinstance(error, Refused):
            found = [item.tree() for item in error.differences]
            print(json.dumps({"differences": found, "event": "refused"}, sort_keys=True), flush=True)
        raise
    if code or options.recorded_source:
        return code
    return _prove(options, run_directory)


def _train(options: argparse.Namespace, record: Any, run_directory: Path) -> int:
    """Run it again, with the source that the record names; the exit code of that part."""
    from apertus_nemo.audit.recorded import run_recorded, unpacked
    from apertus_nemo.audit.relaunch import needs_recorded_source, prepare
    from apertus_nemo.launch.local import default_cache
    from apertus_nemo.launch.show import Display

    cache = default_cache(os.environ)
    if not options.recorded_source:
        archive = needs_recorded_source(record, allow=options.allow, trust=options.trust)
        if archive is not None:
            folder = unpacked(archive, cache, what=str(record.directory.source))
            if not options.quiet:
                print(f"running the source that the run kept, in {folder}", file=sys.stderr, flush=True)
            return run_recorded(folder, _again(options, run_directory), os.environ)
    display = Display(
        quiet=options.quiet, as_json=options.json, stream=sys.stdout if options.json else None, environment=os.environ
    )
    again = prepare(
        options.run, cache=cache, shell=os.environ, display=display, data=options.data, initial=options.initial
    )
    summary = again.start(run_directory, allow=options.allow, display=display)
    if not options.json:
        print(f"{summary.steps} steps, last loss {summary.loss:.4f}, in {summary.run_directory}", flush=True)
    return 0


def _again(options: argparse.Namespace, run_directory: Path) -> list[str]:
    """The same command line, for the recorded source."""
    arguments = ["relaunch", str(options.run), "--run-dir", str(run_directory), "--recorded-source"]
    arguments += [word for name in options.allow for word in ("--allow", name)]
    arguments += [] if options.data is None else ["--data", str(options.data)]
    arguments += [] if options.initial is None else ["--initial", str(options.initial)]
    return arguments + ["--json"] * options.json + ["--quiet"] * options.quiet


def _prove(options: argparse.Namespace, run_directory: Path) -> int:
    """Hold the new record against the original; prints the proof, or the first difference."""
    from apertus_nemo.audit.compare import compare
    from apertus_nemo.audit.relaunch import observations
    from apertus_nemo.audit.report import text, tree

    result = compare(options.run, run_directory)
    result.notes += observations(options.run, run_directory)
    if options.json:
        print(json.dumps({"event": "compared", **tree(result)}, sort_keys=True), flush=True)
    else:
        print(text(result), flush=True)
    return result.exit_code


def _run_dir(given: Path | None, config: Any) -> Path:
    """A folder for the new run, by default one of its own below runs/."""
    if given is not None:
        return given
    name = str(config.get("name", "run"))
    if not name.isprintable() or "/" in name or name.startswith("."):
        raise InputError("the recorded name of the run is no name of a folder; give one with --run-dir")
    return fresh_run_directory(name)


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo relaunch",
        **explained(
            "Do a run again from its record alone, and compare: identical, or the first difference.",
            examples={
                "apertus-nemo relaunch runs/mine": "in a folder of its own below runs/",
                "apertus-nemo relaunch runs/mine --run-dir runs/again --trust": "also where its code is another",
                "apertus-nemo relaunch runs/mine --allow packages.numpy": "let one package differ, on record",
            },
            exit_codes={
                0: "identical",
                1: "different: the first difference is named",
                2: "not a run directory, a changed record, or other code without --trust",
                3: "refused: something pinned is not as it was; or the run could not be done here",
            },
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the new run is kept (default: runs/NAME-N)")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help="let a field of the lock, or all below it, differ; the new record says so for ever; may be given again",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the data of data.source=built are now")
    parser.add_argument("--initial", type=Path, metavar="DIR", help="where the weights to start from are now")
    parser.add_argument(
        "--trust", action="store_true", help="run the recorded source even where it is not the one that is installed"
    )
    parser.add_argument("--json", action="store_true", help="report as JSON lines, for machines")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")
    parser.add_argument("--recorded-source", action="store_true", help=argparse.SUPPRESS)  # this is the recorded one
    return parser
