"""Striping of image files on Lustre: thousands of nodes read one file at once, so it lies on many servers.

The layout is the one that Alps' tutorials use (`lfs setstripe -E 4M -c 1 -E 64M -c 4 -E -1 -c -1 -S 4M`). It holds
for new files only, so an empty file is made before the content is written.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

LAYOUT = ("-E", "4M", "-c", "1", "-E", "64M", "-c", "4", "-E", "-1", "-c", "-1", "-S", "4M")
_OCTAL = re.compile(r"\\([0-7]{3})")


def on_lustre(path: Path, mounts: str) -> bool:
    """Whether `path` lies on a Lustre file system; `mounts` is the text of /proc/self/mounts."""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[1]).rstrip("/")
        if (real == point or real.startswith(f"{point}/")) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind == "lustre"


def stripe(path: Path, environment: Mapping[str, str], mounts: str) -> bool:
    """Make an empty, striped file `path` where it would lie on Lustre and `lfs` is there; whether it was done."""
    lfs = shutil.which("lfs", path=environment.get("PATH"))
    if lfs is None or not on_lustre(path.parent, mounts):
        return False
    try:
        done = subprocess.run([lfs, "setstripe", *LAYOUT, str(path)], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
