"""`apertus-nemo image pull`; see docs/image.md."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apertus_nemo.cli.arguments import explained
from apertus_nemo.cli.image_inspect import printable


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand; 0 when done."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image.oci import Platform
    from apertus_nemo.image.pull import default_cache, pull

    platform = Platform.parse(options.platform) if options.platform else Platform.of_machine(os.uname().machine)
    bar = _Bar()
    # Clean up as after Ctrl-C.
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        pulled = pull(
            options.image,
            folder=options.output,
            cache=options.cache or default_cache(os.environ),
            platform=platform,
            environment=os.environ,
            mirror=options.mirror,
            insecure=options.insecure,
            contents=options.contents,
            with_referrers=options.referrers,
            key=options.key,
            progress=bar.show,
            say=bar.say,
        )
    finally:
        bar.close()
        signal.signal(signal.SIGTERM, former)
    if options.json:
        result = {
            "file": str(pulled.path),
            "made": pulled.made,
            "manifest_digest": pulled.manifest_digest,
            "notes": pulled.notes,
            "platform": pulled.platform,
            "reference": pulled.reference,
            "referrers": pulled.referrers,
            "signed_by": pulled.signed_by,
            "size_bytes": pulled.size_bytes,
            "squashfs_sha256": pulled.sha256,
        }
        print(json.dumps(result, indent=2, sort_keys=True))
        return 0
    said = f"made {pulled.path}" if pulled.made else f"{pulled.path} is there already, and whole"
    print(f"{printable(said)}: {pulled.size_bytes:,} bytes")
    print(f"  of {pulled.reference}@{pulled.manifest_digest} for {pulled.platform}")
    print(f"  squashfs sha256:{pulled.sha256}")
    if pulled.signed_by:
        print(f"  signed by {printable(pulled.signed_by)}")
    for one in pulled.referrers:
        print(f"  referrer {printable(one['artifact_type'])} {one['manifest_digest']}")
    for note in pulled.notes:
        print(f"  note: {note}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="apertus-nemo image pull",
        **explained(
            "Bring an image from a registry, checked, as a squashfs file.",
            examples={
                "apertus-nemo image pull gh200-1.0.0 --output images": "a version, by the digest of its release",
                "apertus-nemo image pull 127.0.0.1:5000/apertus/cpu:1.0.0": "a reference",
            },
            exit_codes={
                0: "done",
                1: "something that came, or is there, is not what its digest says, or is not signed",
                2: "no such image or platform, or something malformed",
                3: "the registry or the disk refuses, or mksquashfs is missing",
            },
        ),
    )
    options.add_argument(
        "image", metavar="IMAGE", help="a version such as gh200-1.0.0, or HOST/NAME:TAG, HOST/NAME@DIGEST"
    )
    options.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="folder of the file (default: here)"
    )
    options.add_argument("--platform", metavar="OS/ARCH", help="which of an index (default: this machine's)")
    options.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder of blobs (default: ~/.cache/apertus-nemo/images)"
    )
    options.add_argument("--from", dest="mirror", metavar="HOST/NAME", help="ask this repository; the digest stays")
    options.add_argument(
        "--contents",
        choices=("enroot", "plain"),
        default="enroot",
        help="with the files that `enroot import` adds (default), or the image's alone",
    )
    options.add_argument(
        "--no-referrers", dest="referrers", action="store_false", help="leave SBOM, lock, signatures out"
    )
    options.add_argument(
        "--key", type=Path, metavar="FILE", help="fetch only what this public key, a PEM file, has signed"
    )
    options.add_argument("--insecure", action="store_true", help="allow plain HTTP and any certificate")
    options.add_argument("--json", action="store_true", help="print the result as JSON")
    return options


class _Bar:
    """A progress bar on a terminal, nothing elsewhere; blobs come in several threads."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._bar: Any = None
        self._lock = threading.Lock()
        self._shown = sys.stderr.isatty()

    def say(self, line: str) -> None:
        """A line of its own."""
        if self._shown:
            self.close()
            print(line, file=sys.stderr)

    def show(self, digest: str, size_bytes: int) -> None:
        """So far of one blob."""
        if not self._shown:
            return
        with self._lock:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(unit="B", unit_scale=True, desc="layers", file=sys.stderr)
            self._sizes[digest] = size_bytes
            self._bar.update(sum(self._sizes.values()) - self._bar.n)

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
