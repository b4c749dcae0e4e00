"""`apertus-nemo image inspect`; see docs/image.md."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apertus_nemo.cli.arguments import explained

if TYPE_CHECKING:
    from apertus_nemo.image.layout import Image
    from apertus_nemo.image.oci import Platform


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand; 0 when done."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image.oci import Platform

    platform = Platform.parse(options.platform) if options.platform else Platform.of_machine(os.uname().machine)
    image = find(options.image, platform, insecure=options.insecure)
    if options.json:
        print(json.dumps(tree(image), indent=2, sort_keys=True))
    else:
        print_image(options.image, image)
    return 0


def find(text: str, platform: Platform, *, insecure: bool) -> Image:
    """The image of a layout, where there is such a folder, else of a registry."""
    from pathlib import Path

    from apertus_nemo.image.layout import Layout
    from apertus_nemo.image.pull import source_of
    from apertus_nemo.image.registry import Repository

    folder, _, name = text.removeprefix("oci:").partition(":")
    if text.startswith("oci:") or Path(folder).is_dir():
        return Layout.open(Path(folder)).image(platform, name or None)
    reference = source_of(text, platform).reference
    with Repository(reference, environment=os.environ, insecure=insecure) as repository:
        return repository.image(repository.resolve(reference.name), platform)


def tree(image: Image) -> dict[str, Any]:
    """What --json prints."""
    return {
        "config_digest": image.manifest.config.digest,
        "entrypoint": list(image.config.entrypoint),
        "command": list(image.config.command),
        "environment": list(image.config.environment),
        "index_digest": image.index.digest if image.index else None,
        "labels": dict(image.config.labels),
        "layers": [
            {"compression": kind, "diff_id": diff, "digest": layer.digest, "size_bytes": layer.size_bytes}
            for layer, kind, diff in zip(image.manifest.layers, image.compressions, image.config.diff_ids, strict=True)
        ],
        "manifest_digest": image.descriptor.digest,
        "platform": str(image.config.platform),
        "size_bytes": image.size_bytes,
        "user": image.config.user,
        "working_dir": image.config.working_dir,
    }


def print_image(name: str, image: Image) -> None:
    """What a person reads."""
    layers = counted(len(image.manifest.layers), "layer")
    print(f"{name} for {image.config.platform}: {layers}, {image.size_bytes:,} bytes")
    print(f"  manifest digest {image.descriptor.digest}")
    if image.index:
        print(f"  index digest    {image.index.digest}")
    print(f"  config digest   {image.manifest.config.digest}")
    for layer, kind in zip(image.manifest.layers, image.compressions, strict=True):
        print(f"  layer {layer.digest}  {layer.size_bytes:>14,} bytes  {kind}")
    for key, value in sorted(image.config.labels.items()):
        print(f"  label {key}={printable(value)}")
    for line in image.config.environment:
        print(f"  env   {printable(line)}")


def counted(number: int, what: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """`text` without what would drive a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="apertus-nemo image inspect",
        **explained(
            "Print what an image is, without fetching its layers.",
            examples={
                "apertus-nemo image inspect gh200-1.0.0": "",
                "apertus-nemo image inspect layouts/cpu:1.0.0 --platform linux/arm64": "an OCI image layout",
            },
            exit_codes={
                0: "printed",
                1: "a document is not what its digest says",
                2: "no such image, none for this platform, or something malformed",
                3: "the registry cannot be reached or refuses",
            },
        ),
    )
    options.add_argument(
        "image", metavar="IMAGE", help="a version, HOST/NAME:TAG, HOST/NAME@DIGEST, or an OCI image layout: FOLDER:TAG"
    )
    options.add_argument("--platform", metavar="OS/ARCH", help="which of an index (default: this machine's)")
    options.add_argument("--insecure", action="store_true", help="allow plain HTTP and any certificate")
    options.add_argument("--json", action="store_true", help="print JSON")
    return options
