"""`apertus-nemo image verify`; see docs/image.md."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained
from apertus_nemo.cli.selftest import PARTS


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand; 0 when no check failed, 1 when one did."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image.oci import Platform
    from apertus_nemo.image.pull import default_cache
    from apertus_nemo.selftest.check import Check
    from apertus_nemo.selftest.in_image import Wanted, to_json, verify

    def tell(check: Check) -> None:
        if not options.json:
            print(check.line(), flush=True)

    def say(line: str) -> None:
        if sys.stderr.isatty() and not options.json:
            print(line, file=sys.stderr, flush=True)

    wanted = Wanted(
        options.image,
        platform=Platform.parse(options.platform) if options.platform else Platform.of_machine(os.uname().machine),
        cache=options.cache or default_cache(os.environ),
        environment=os.environ,
        mirror=options.mirror,
        insecure=options.insecure,
    )
    # Clean up as after Ctrl-C.
    former = {
        one: signal.signal(one, lambda number, _: sys.exit(128 + number)) for one in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        found = verify(wanted, only=options.only, limit_s=options.time_limit, tell=tell, say=say)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if options.json:
        print(to_json(found))
    return found.exit_code


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 86400 seconds")
    return value


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="apertus-nemo image verify",
        **explained(
            "Run the self-test of an image inside it, without a network and without an engine.",
            examples={
                "apertus-nemo image verify images/cpu-1.0.0-1da79e64f3b1.sqsh": "what `image pull` made",
                "apertus-nemo image verify layouts/cpu:cpu-1.0.0 --only packages": "a layout, versions alone",
            },
            exit_codes={
                0: "nothing failed; what could not be checked is said",
                1: "a check failed: its line says what is not as it should be",
                2: "no such image, or no image of apertus-nemo",
                3: "this machine cannot run it, or not in the time that is given; a registry or the disk refuses",
            },
        ),
    )
    options.add_argument(
        "image", metavar="IMAGE", help="a .sqsh file, an OCI image layout (FOLDER:TAG), a version, or HOST/NAME:TAG"
    )
    options.add_argument("--platform", metavar="OS/ARCH", help="which of an index (default: this machine's)")
    options.add_argument(
        "--only",
        action="append",
        default=[],
        choices=PARTS,
        metavar="PART",
        help=f"one of {', '.join(PARTS)}; may be given again",
    )
    options.add_argument(
        "--time-limit", type=_seconds, default=3600.0, metavar="SECONDS", help="of the self-test (default: 3600)"
    )
    options.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder of blobs (default: ~/.cache/apertus-nemo/images)"
    )
    options.add_argument("--from", dest="mirror", metavar="HOST/NAME", help="ask this repository; the digest stays")
    options.add_argument("--insecure", action="store_true", help="allow plain HTTP and any certificate")
    options.add_argument("--json", action="store_true", help="print the result as JSON")
    return options
