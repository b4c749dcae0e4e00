"""What the sidecar of a `.sqsh` file says, and whether the file's name, size and processor agree with it.

    facts = described(path)        # None where there is no sidecar
    contradictions(path, facts, size_bytes=..., site=...)

Quick: no byte of the image is read. `apertus-nemo image check` reads them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.edf.sites import PLATFORMS, Site


@dataclass(frozen=True)
class Described:
    """An image on disk, by the file beside it."""

    manifest_digest: str  # "sha256:<hex>"
    platform: str  # "linux/arm64"
    sha256: str  # of the file
    size_bytes: int


def described(path: Path) -> Described | None:
    """The facts beside `path`, or None. Raises InputError for a sidecar that is none."""
    from apertus_nemo.image.sqsh import read_sidecar, sidecar_path

    if not path.name or not sidecar_path(path).is_file():
        return None
    tree = read_sidecar(path)
    image, file = tree["image"], tree["squashfs"]
    return Described(image["manifest_digest"], image["platform"], file["sha256"], file["size_bytes"])


def contradictions(path: Path, facts: Described, *, size_bytes: int, site: Site | None) -> list[tuple[str, str, str]]:
    """(what, why, do) of everything that does not fit."""
    found = []
    if size_bytes != facts.size_bytes:
        what = f"the image has {size_bytes:,} bytes"
        why = f"the sidecar beside it says {facts.size_bytes:,}: it is another file, or half of one"
        found.append((what, why, "pull it again"))
    digits = re.findall(r"(?<![0-9a-f])[0-9a-f]{12,64}(?![0-9a-f])", path.name)
    hashes = (facts.manifest_digest.removeprefix("sha256:"), facts.sha256)
    if digits and not any(one.startswith(digit) for digit in digits for one in hashes):
        what = f"the name of the image says {digits[-1]}"
        why = f"the sidecar beside it says manifest digest {facts.manifest_digest}"
        found.append((what, why, "give the file the name that `apertus-nemo image pull` gave it, or pull it again"))
    platform = PLATFORMS.get(site.architecture) if site is not None else None
    if platform is not None and not (facts.platform + "/").startswith(platform + "/"):
        what, why = f"the image is for {facts.platform}", f"{site.name if site else ''} has {platform}"
        found.append((what, why, f"take the image for {platform}"))
    return found
