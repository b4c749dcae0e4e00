"""`apertus-nemo image build FAMILY`: an image from its definition and lock, to the same digest; see docs/image.md."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apertus_nemo.cli.arguments import explained

if TYPE_CHECKING:
    from apertus_nemo.image.build import Order, Result


def main(arguments: Sequence[str]) -> int:
    """0 when the layout is there. Errors leave as ApertusError, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image import build

    order = _order(options)
    build.check_order(order)
    if options.containerfile:
        print("\n".join(build.containerfiles(order, platform) for platform in order.platforms), end="")
        return 0
    begun = time.monotonic()

    def say(text: str) -> None:
        if not options.json:
            print(f"[{time.monotonic() - begun:4.0f} s] {text}", file=sys.stderr, flush=True)

    # Clean up as after Ctrl-C.
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if options.download_only:
            for platform in order.platforms:
                found = build.fetch(order, platform, say)
                say(
                    f"{platform}: {len(found.debs)} Debian and {len(found.python)} Python packages are in {order.cache}"
                )
            return 0
        output = Path("images") / order.lock.name if options.output is None else options.output
        result = build.build(order, output, builder=options.builder, say=say)
    finally:
        signal.signal(signal.SIGTERM, former)
    if options.json:
        print(json.dumps(_tree(result), indent=2, sort_keys=True))
        return 0
    for platform, made in result.platforms.items():
        print(f"{result.name} for {platform}: {made.manifest_digest}")
        for part in made.layers:
            print(f"  {part.size_bytes / 1e6:8.1f} MB  {part.what:8} {part.digest}{'  (kept)' if part.kept else ''}")
    print(f"built {result.output}")
    return 0


def _order(options: argparse.Namespace) -> Order:
    """What the options ask for."""
    from apertus_nemo.errors import InputError
    from apertus_nemo.image.build import Order
    from apertus_nemo.image.checkout import cache_folder, checkout
    from apertus_nemo.image.definition import read_definition
    from apertus_nemo.image.families import DEFINITION, LOCK, find
    from apertus_nemo.image.lock import read_lock
    from apertus_nemo.image.oci import Platform

    root = checkout()
    folder = find(options.family, root / "containers").folder
    definition = read_definition(folder / DEFINITION)
    asked = options.platform or [str(Platform.of_machine(os.uname().machine))]
    platforms = tuple(dict.fromkeys(str(Platform.parse(text)) for text in asked))
    for platform in platforms:
        if platform not in definition.platforms:
            raise InputError(f"{definition.name} is not for {platform}; it is for {', '.join(definition.platforms)}")
    return Order(
        definition=definition,
        lock=read_lock(folder / LOCK),
        root=root,
        folder=folder,
        platforms=platforms,
        cache=(options.cache or cache_folder(os.environ)).absolute(),
        debian_mirror=options.debian_mirror,
        allow_dirty=options.allow_dirty,
        anew=options.no_cache,
    )


def _tree(result: Result) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(result), "output": str(result.output)}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="apertus-nemo image build",
        **explained(
            "Build the image of a family from its definition and lock: same inputs, same digest.",
            examples={
                "apertus-nemo image build cpu": "into images/cpu-1.0.0",
                "apertus-nemo image build cpu --platform linux/amd64 --platform linux/arm64": "one index for both",
                "apertus-nemo image build cpu --download-only": "fetch all that a build needs, to build offline later",
            },
            exit_codes={
                0: "built, or fetched",
                2: "no such family, a lock that is stale or not resolved, a tree with changes, an output that is there",
                3: "packages cannot be had, a program is missing or fails, or the disk refuses",
            },
        ),
    )
    options.add_argument("family", metavar="FAMILY", help="a folder of containers/")
    options.add_argument(
        "--platform", action="append", default=[], metavar="OS/ARCH", help="repeatable (default: this machine's)"
    )
    options.add_argument("--output", type=Path, metavar="DIR", help="the layout (default: images/NAME-VERSION)")
    options.add_argument(
        "--cache", type=Path, metavar="DIR", help="packages and layers (default: ~/.cache/apertus-nemo/images)"
    )
    options.add_argument("--no-cache", action="store_true", help="take no layer from the cache, and keep none there")
    options.add_argument(
        "--builder", metavar="PROGRAM", help="buildah, podman or docker (default: the first that is there)"
    )
    options.add_argument(
        "--debian-mirror", metavar="URL", help="folder that holds debian and debian-security (default: apt's own)"
    )
    options.add_argument("--allow-dirty", action="store_true", help="build from a checkout with changes")
    options.add_argument("--download-only", action="store_true", help="fetch the packages and stop")
    options.add_argument("--containerfile", action="store_true", help="print what the builder is given and stop")
    options.add_argument("--json", action="store_true", help="print the result as JSON, and no progress")
    return options
