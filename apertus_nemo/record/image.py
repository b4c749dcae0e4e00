"""The image that this process runs in, as a lock pins it.

    find_image()                          # {"lock_digest", "manifest_digest", "name", "stated_by"}, or None on a host
    pinned(find_image(), reference)       # the field `image` of a lock

An image of ours holds its definition and its lock in `/etc/apertus-nemo`, and a `.sqsh` that `image pull` made the
digest of the manifest, which no image can hold itself. Nothing is taken from the environment, which anybody sets.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import is_unknown, loads, sha256_hex, unknown
from apertus_nemo.record.files import read_bytes

FOLDER = Path("/etc/apertus-nemo")
MANIFEST = "manifest-digest"  # one line, "sha256:<64 hex digits>"
NO_IMAGE = "no image: the installed packages are listed one by one"
BY_IMAGE, BY_RECIPE = "the image", "image.reference of the recipe"

_MAX_BYTES = 16 * 2**20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


def find_image(folder: Path = FOLDER, *, prefix: str = sys.prefix) -> dict[str, Any] | None:
    """What the image says of itself; None where there is none, or where Python (`prefix`) is not the image's.

    Raises InputError where the image's own files cannot be read.
    """
    if not (folder / "lock.json").is_file():
        return None
    import tomllib

    what = str(folder / "image.toml")
    try:
        definition = tomllib.loads(read_bytes(folder / "image.toml", max_bytes=_MAX_BYTES).decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: is not TOML: {error}") from error
    python = definition.get("python")
    if not isinstance(python, dict) or str(python.get("prefix")) != prefix:
        return None
    data = read_bytes(folder / "lock.json", max_bytes=_MAX_BYTES)
    lock = loads(data, what=str(folder / "lock.json"), max_bytes=_MAX_BYTES)
    if not isinstance(lock, dict) or not all(isinstance(lock.get(key), str) for key in ("family", "version")):
        raise InputError(f"{folder / 'lock.json'}: is not the lock of an image")
    manifest, stated_by = _manifest(folder / MANIFEST)
    return {
        "lock_digest": f"sha256:{sha256_hex(data)}",
        "manifest_digest": manifest,
        "name": f"{lock['family']}-{lock['version']}",
        "stated_by": stated_by,
    }


def _manifest(path: Path) -> tuple[Any, str | None]:
    if not path.is_file():
        reason = "the image does not hold it; image.reference=HOST/NAME@sha256:... in the recipe says it"
        return unknown(reason), None
    text = read_bytes(path, max_bytes=1000).decode(errors="replace").strip()
    if not _DIGEST.match(text):
        raise InputError(f"{path}: is not the digest of a manifest")
    return text, BY_IMAGE


def pinned(found: Mapping[str, Any] | None, reference: str | None) -> dict[str, Any]:
    """The field `image` of a lock: `found` with what the recipe says of it.

    Raises InputError for a reference without a digest, with another than the image's own, and where there is no image.
    """
    if reference is None:
        return dict(found) if found is not None else unknown(NO_IMAGE)
    digest = reference.rpartition("@")[2]
    if not _DIGEST.match(digest):
        raise InputError(f"image.reference {reference} has no digest: write HOST/NAME@sha256:...")
    if found is None:
        raise InputError(
            f"image.reference names the image {reference}, but this is not run inside an image of apertus-nemo: start "
            "it in that image, or leave image.reference out"
        )
    own = found["manifest_digest"]
    if is_unknown(own):
        return {**found, "manifest_digest": digest, "stated_by": BY_RECIPE}
    if own != digest:
        raise InputError(f"image.reference names the image {reference}, and this is run inside {own}")
    return dict(found)
