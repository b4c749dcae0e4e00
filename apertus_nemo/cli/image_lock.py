"""`apertus-nemo image lock FAMILY`: resolve a definition into its lock, or compare; see docs/image.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """0 written or equal, 1 where --check finds differences. Errors leave as ApertusError."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image.base_image import from_registry
    from apertus_nemo.image.checkout import cache_folder, checkout
    from apertus_nemo.image.definition import read_definition
    from apertus_nemo.image.families import DEFINITION, LOCK, find
    from apertus_nemo.image.lock import differences, read_lock, stale
    from apertus_nemo.image.resolve import resolve
    from apertus_nemo.record.files import write_atomic

    root = checkout()
    folder = find(options.family, root / "containers").folder
    definition = read_definition(folder / DEFINITION)
    if options.check and options.offline:
        changed = stale(read_lock(folder / LOCK), definition, root)
        return _compared(options.family, changed)
    lock = resolve(
        definition,
        root,
        cache=cache_folder(os.environ),
        look=from_registry(os.environ),
        debian_mirror=options.debian_mirror,
        base_packages=options.base_packages,
        write=not options.check,
    )
    if options.check:
        return _compared(options.family, differences(read_lock(folder / LOCK), lock))
    write_atomic(folder / LOCK, lock.to_bytes())
    for platform in lock.platforms:
        debian, python = len(lock.debian(platform)), len(lock.python(platform))
        print(f"{lock.name} {platform}: {debian} Debian packages, {python} Python packages")
    for line in lock.unresolved:
        print(f"unresolved: {line}")
    print(f"image lock {lock.digest}")
    return 0


def _compared(family: str, changed: Sequence[str]) -> int:
    for line in changed:
        print(line if line.isprintable() else ascii(line)[1:-1])
    if changed:
        print(f"the lock of {family} is not what `image lock {family}` would write", file=sys.stderr)
        return 1
    print(f"the lock of {family} is what `image lock {family}` would write")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo image lock",
        **explained(
            "Resolve the definition of a family of images into its lock: every package, with version and hash.",
            examples={
                "apertus-nemo image lock cpu": "writes containers/cpu/lock.json",
                "apertus-nemo image lock gh200 --check --offline": "is the lock of this definition?",
            },
            exit_codes={
                0: "written, or equal",
                1: "--check: a difference",
                2: "no such family, or a definition that is wrong",
                3: "a mirror cannot be reached, or a tool is missing",
            },
        ),
    )
    parser.add_argument("family", metavar="FAMILY", help="a folder of containers/")
    parser.add_argument("--check", action="store_true", help="write nothing; say what would be written otherwise")
    parser.add_argument(
        "--offline", action="store_true", help="with --check: compare with the definition and requirements only"
    )
    parser.add_argument(
        "--debian-mirror", metavar="URL", help="folder that holds debian and debian-security (default: apt's own)"
    )
    parser.add_argument(
        "--base-packages",
        type=Path,
        metavar="FILE",
        help="what `pip list --format json` printed inside the base",
    )
    return parser
