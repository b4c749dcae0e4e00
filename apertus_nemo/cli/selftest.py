"""`apertus-nemo selftest`: whether what is installed here is what its lock says, and works; see docs/selftest.md."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained

PARTS = ("packages", "imports", "step", "collectives")  # of selftest.run, which is imported only to be run


def main(arguments: Sequence[str]) -> int:
    """Run the verb; 0 when no check failed, 1 when one did."""
    options = parser().parse_args(arguments)
    from apertus_nemo.selftest.check import Check
    from apertus_nemo.selftest.run import selftest

    def say(check: Check) -> None:
        if not options.json:
            print(check.line(), flush=True)

    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clean up as after Ctrl-C
    try:
        result = selftest(lock=options.lock, only=options.only, shell=os.environ, say=say)
    finally:
        signal.signal(signal.SIGTERM, former)
    if options.json:
        print(json.dumps(result.tree(), indent=2, sort_keys=True))
    return result.exit_code


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    options = argparse.ArgumentParser(
        prog="apertus-nemo selftest",
        **explained(
            "Say whether what is installed here is what its lock says, and works.",
            examples={
                "apertus-nemo selftest": "all of it: packages, imports, a training step, all-reduce",
                "apertus-nemo selftest --only packages --lock containers/cpu/lock.json": "versions alone, in seconds",
            },
            exit_codes={
                0: "nothing failed; what could not be checked is said",
                1: "a check failed: its line says what is not as it should be",
                2: "a lock that cannot be read, or is for other machines",
                3: "this machine cannot do it: no space for temporary files",
            },
        ),
    )
    options.add_argument(
        "--lock",
        type=Path,
        metavar="FILE",
        help="the lock of an image (default: /etc/apertus-nemo/lock.json, else the package's own requirements)",
    )
    options.add_argument(
        "--only",
        action="append",
        default=[],
        choices=PARTS,
        metavar="PART",
        help=f"one of {', '.join(PARTS)}; may be given again",
    )
    options.add_argument("--json", action="store_true", help="print the result as JSON")
    return options
