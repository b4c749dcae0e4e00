"""`apertus-nemo image check`; see docs/image.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand; 0 when the file is as it was made. A changed one leaves as Differs."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image.sqsh import check

    found = check(options.file, sha256=options.sha256)
    if options.json:
        result = {
            "file": str(found.path),
            "manifest_digest": found.manifest_digest,
            "platform": found.platform,
            "size_bytes": found.size_bytes,
            "squashfs_sha256": found.sha256,
        }
        print(json.dumps(result, indent=2, sort_keys=True))
        return 0
    print(f"{found.path}: as it was made, {found.size_bytes:,} bytes")
    if found.manifest_digest:
        print(f"  manifest digest {found.manifest_digest} for {found.platform}")
    print(f"  squashfs sha256:{found.sha256}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="apertus-nemo image check",
        **explained(
            "Read every byte of a .sqsh file and hold it against its sidecar.",
            examples={"apertus-nemo image check images/cpu-1.0.0-1da79e64f3b1.sqsh": ""},
            exit_codes={
                0: "as it was made",
                1: "changed: the bytes are named",
                2: "no sidecar, or none that can be read; no squashfs file",
            },
        ),
    )
    options.add_argument("file", type=Path, metavar="FILE", help="a file that `image pull` made")
    options.add_argument("--sha256", metavar="HEX", help="what its SHA-256 must be, from a lock or a record")
    options.add_argument("--json", action="store_true", help="print the result as JSON")
    return options
