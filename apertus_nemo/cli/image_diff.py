"""`apertus-nemo image diff A B`: what changed between two images, and what it may do; see docs/image.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apertus_nemo.cli.arguments import explained
from apertus_nemo.cli.image_inspect import counted

if TYPE_CHECKING:
    from apertus_nemo.image.diff import Change, Changes

_MAX_FILES = 20


def main(arguments: Sequence[str]) -> int:
    """0 where nothing changed, 1 where something did."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image.diff import diff, side
    from apertus_nemo.image.oci import Platform

    here = str(Platform.of_machine(os.uname().machine))
    a = side(options.a, options.platform or here)
    platform = options.platform or (here if here in a.lock.platforms else a.lock.platforms[0])
    found = diff(a, side(options.b, platform, like=a), platform)
    if options.json:
        tree = {
            "changes": [dataclasses.asdict(one) for one in found.changes],
            "effect": found.effect,
            "not_compared": found.not_compared,
            "platform": platform,
        }
        print(json.dumps(tree, indent=2, sort_keys=True))
    else:
        _print(found, platform)
    return 1 if found.changes else 0


def _print(found: Changes, platform: str) -> None:
    files = [one for one in found.changes if one.kind == "file"]
    shown = [one for one in found.changes if one.kind != "file"] + files[:_MAX_FILES]
    for one in shown:
        print(_line(one))
    if len(files) > _MAX_FILES:
        print(f"  and {len(files) - _MAX_FILES} more files; --json lists them")
    for text in found.not_compared:
        print(f"not compared: {text}")
    if found.changes:
        print(f"{counted(len(found.changes), 'change')} for {platform}; together they may change: {found.effect}")
    else:
        print(f"nothing changed for {platform}")


def _line(one: Change) -> str:
    old, new = map(_short, _file(one.old, one.new) if one.kind == "file" else (one.old, one.new))
    line = f"{one.effect:8} {one.kind} {one.name}: {old} -> {new}  ({one.reason})"
    return line if line.isprintable() else ascii(line)[1:-1]


def _file(old: str | None, new: str | None) -> tuple[str | None, str | None]:
    """Both of MODE UID:GID CONTENT, without what is alike, and with twelve digits of a SHA-256."""
    before, after = ([] if text is None else text.split(" ", 2) for text in (old, new))
    if len(before) == len(after):
        differ = [a != b for a, b in zip(before, after, strict=True)]
        before, after = ([word for word, said in zip(one, differ, strict=True) if said] for one in (before, after))
    old, new = (" ".join([*one[:-1], one[-1][:12] if len(one[-1]) == 64 else one[-1]]) if one else None
                for one in (before, after))  # fmt: skip
    return old, new


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= 72 else f"{text[:69]}..."


def parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo image diff",
        **explained(
            "Say what changed between two images, and what each change may do: nothing, speed, bits.",
            examples={
                "apertus-nemo image diff images/cpu-1.0.0 images/cpu-1.1.0": "two layouts: also files",
                "apertus-nemo image diff old/lock.json cpu-1.0.0": "a lock of before and the current version",
            },
            exit_codes={
                0: "nothing changed",
                1: "something did, or a layer is not what its digest says",
                2: "no such image, or none for this platform",
                3: "a file cannot be read",
            },
        ),
    )
    parser.add_argument("a", metavar="A", help="the older image: a name, a lock file, or an OCI layout (DIR, DIR:NAME)")
    parser.add_argument("b", metavar="B", help="the newer image")
    parser.add_argument("--platform", metavar="OS/ARCH", help="linux/amd64 or linux/arm64 (default: this machine's)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
