"""`apertus-nemo image list`: families and versions, what is in each, and for which machine; see docs/image.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from apertus_nemo.cli.arguments import explained

# What tells one image from another at a glance.
_TOLD = ("torch", "nemo-toolkit", "megatron-core", "transformer-engine", "numpy", "transformers")


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand; 0 when done."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image.families import family_names, versions

    images = [_tree(one) for family in family_names() for one in versions(family)]
    if options.json:
        print(json.dumps(images, indent=2, sort_keys=True))
        return 0
    for number, image in enumerate(images):
        if number:
            print()
        print(f"{image['name']}  {image['state']}  {image['title']}")
        print(f"  for {image['machine']}")
        for platform, found in image["platforms"].items():
            print(f"  {platform}: {', '.join(f'{name} {version}' for name, version in found['packages'].items())}")
            if found["manifest_digest"]:
                print(f"    {found['reference']} {found['manifest_digest']}")
        if image["unresolved"]:
            print(f"  not resolved: {len(image['unresolved'])} things, the first is {image['unresolved'][0]}")
    return 0


def _tree(one: Any) -> dict[str, Any]:
    """A version of a family; of an older one, only what its release says."""
    from apertus_nemo.image.definition import read_definition
    from apertus_nemo.image.families import DEFINITION, LOCK
    from apertus_nemo.image.lock import read_lock

    definition, lock = read_definition(one.folder / DEFINITION), read_lock(one.folder / LOCK)
    current = one.version == definition.version
    platforms = {}
    for platform in sorted({*one.releases, *(definition.platforms if current else ())}):
        release = one.releases.get(platform)
        platforms[platform] = {
            "manifest_digest": None if release is None else release.manifest_digest,
            "packages": _packages(lock, platform) if current else {},
            "reference": None if release is None else release.reference,
        }
    return {
        "family": one.family,
        "machine": definition.machine,
        "name": one.name,
        "platforms": platforms,
        "state": one.state,
        "title": definition.title,
        "unresolved": lock.unresolved if current else [],
        "version": one.version,
    }


def _packages(lock: Any, platform: str) -> dict[str, str]:
    found = {item.name: item.version for item in lock.python(platform)}
    provided = lock.tree["base"].get("provides", {})
    found.update({name: f"{text} (base)" for name, text in provided.items() if isinstance(text, str)})
    return {name: found[name] for name in _TOLD if name in found}


def parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo image list",
        **explained(
            "List the families of images and their versions: what is in each, and for which machine.",
            examples={"apertus-nemo image list": ""},
            exit_codes={0: "done", 2: "a definition, a lock or a list of releases that is malformed"},
        ),
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
