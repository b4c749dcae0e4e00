"""`apertus-nemo record push` and `apertus-nemo record pull`; see docs/record.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """Run the verb; 0 when done. Errors leave as `apertus_nemo.errors.ApertusError`, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    from apertus_nemo.record.copies import pull, push

    # Clean up as after Ctrl-C.
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if options.verb == "push":
            copied = push(options.run, options.url, checkpoints=options.checkpoints)
        else:
            copied = pull(options.url, options.folder)
    finally:
        signal.signal(signal.SIGTERM, former)
    if options.json:
        result = {
            "copy_digest": f"sha256:{copied.digest}",
            "files": copied.files,
            "place": copied.place,
            "size_bytes": copied.size_bytes,
        }
        print(json.dumps(result, indent=2, sort_keys=True))
    else:
        done = "pushed to" if options.verb == "push" else "pulled into"
        print(f"{done} {copied.place}: {copied.files:,} files, {copied.size_bytes:,} bytes")
        print(f"  copy digest sha256:{copied.digest}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo record",
        **explained(
            "Copy the record of a run to another place, and back: whole or not at all.",
            examples={
                "apertus-nemo record push runs/mine s3://bucket/mine": "verify and compare read it there",
                "apertus-nemo record pull s3://bucket/mine runs/back": "",
            },
            exit_codes={
                0: "done",
                1: "pull: a file is not as it was pushed",
                2: "not a run, no whole copy, or a target that holds something",
                3: "the place cannot be reached or written, a package for it is missing, or the run is being written",
            },
        ),
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{push,pull}")
    push = verbs.add_parser(
        "push",
        help="to a folder or an fsspec URL",
        **explained(
            "Copy the record of a run to a new place.",
            examples={
                "apertus-nemo record push runs/mine s3://bucket/mine": "",
                "apertus-nemo record push runs/mine /archive/mine --no-checkpoints": "a small one",
            },
            exit_codes={
                0: "pushed",
                2: "not a run, or a target that holds something",
                3: "the place cannot be reached or written, a package for it is missing, or the run is being written",
            },
        ),
    )
    push.add_argument("run", type=Path, metavar="RUN", help="run directory that nothing writes")
    push.add_argument("url", metavar="URL", help="folder, or fsspec URL such as s3://bucket/name; must be empty")
    push.add_argument("--no-checkpoints", dest="checkpoints", action="store_false", help="leave the checkpoints out")
    pull = verbs.add_parser(
        "pull",
        help="from there into a new folder",
        **explained(
            "Copy a record back, and hold every file against what was pushed.",
            examples={"apertus-nemo record pull s3://bucket/mine runs/back": ""},
            exit_codes={
                0: "pulled",
                1: "a file is not as it was pushed; it is named, and nothing is left",
                2: "no whole copy, or a target that holds something",
                3: "the place cannot be reached, the disk refuses, or a package for it is missing",
            },
        ),
    )
    pull.add_argument("url", metavar="URL", help="where the copy lies")
    pull.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    for verb in (push, pull):
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
