"""`apertus-nemo image publish LAYOUT REFERENCE`: push a built image and what refers to it; see docs/image.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """0 when the registry has it all. Errors leave as ApertusError, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    from dataclasses import asdict

    from apertus_nemo.image.checkout import checkout
    from apertus_nemo.image.families import RELEASES, find
    from apertus_nemo.image.layout import Layout
    from apertus_nemo.image.publish import publish
    from apertus_nemo.image.reference import Reference

    written: list[Path] = []

    def folder(family: str) -> Path:
        found = options.releases
        written.append(found if found is not None else find(family, checkout() / "containers").folder)
        return written[-1]

    releases = publish(
        Layout.open(options.layout),
        Reference.parse(options.reference),
        folder=folder,
        environment=os.environ,
        name=options.name,
        edfs=options.edf,
        key=options.sign,
        insecure=options.insecure,
        say=lambda text: None if options.json else print(text, file=sys.stderr),
    )
    if options.json:
        print(json.dumps({name: asdict(one) for name, one in releases.items()}, indent=2, sort_keys=True))
        return 0
    for name, one in releases.items():
        print(f"published {one.reference} for {name}: {one.manifest_digest}")
    print(f"commit {written[-1] / RELEASES}: it says for ever what this version is")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="apertus-nemo image publish",
        **explained(
            "Push a built image with its lock, SBOM, EDFs and signature; a published version never changes.",
            examples={
                "apertus-nemo image publish images/cpu-1.0.0 127.0.0.1:5000/apertus/cpu": "under its version",
                "apertus-nemo image publish DIR HOST/NAME --sign key.pem --edf edf/cpu-daint.toml": "with more",
            },
            exit_codes={
                0: "the registry has it all",
                1: "a layer is not what its digest says",
                2: "the version or the tag means another image already, or this is no image of ours",
                3: "the registry refuses or cannot be reached, or a file cannot be written",
            },
        ),
    )
    options.add_argument("layout", type=Path, metavar="LAYOUT", help="the folder that `image build` wrote")
    options.add_argument("reference", metavar="REFERENCE", help="HOST/NAME, or HOST/NAME:TAG (default: the version)")
    options.add_argument("--name", metavar="NAME", help="which image of the layout (default: the only one, or index)")
    options.add_argument("--edf", type=Path, action="append", default=[], metavar="FILE", help="an EDF; repeatable")
    options.add_argument("--sign", type=Path, metavar="KEY", help="sign with this private key, a PEM file")
    options.add_argument(
        "--releases", type=Path, metavar="DIR", help="where releases.json lies (default: containers/FAMILY)"
    )
    options.add_argument("--insecure", action="store_true", help="allow plain HTTP and any certificate")
    options.add_argument("--json", action="store_true", help="print the result as JSON")
    return options
