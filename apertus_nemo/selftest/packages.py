"""Installed packages against a lock: Python's and Debian's, by version; and Python's files by what their RECORD says.

    python_versions({"numpy": "1.26.4"}, installed(path), strict=True)    # a Check
    debian_versions([("libc6", "amd64", "2.36-9")], status)

Versions are read from the packages' own metadata on the path that ranks import from.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from apertus_nemo.image.python_packages import normal
from apertus_nemo.record.canonical import is_unknown
from apertus_nemo.selftest.check import FAILED, Check, verdict

OURS = "apertus-nemo"  # its source is no package of a lock
DPKG_STATUS = Path("var/lib/dpkg/status")  # below the root
_INFO = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)\.dist-info\Z")
_SCRIPT = re.compile(r"(\.\./)+bin/")
_BLOCK_BYTES = 2**20


def installed(path: Sequence[str]) -> dict[str, list[tuple[str, Path]]]:
    """Normalised name -> [(version, its .dist-info)], of the first folder of `path` that has it.

    Two entries are a fault: one was put over the other, and nobody knows which files are there.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for entry in path:
        folder, here = Path(entry or "."), dict[str, list[tuple[str, Path]]]()
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            if match := _INFO.match(name):
                here.setdefault(normal(match["name"]), []).append((match["version"], folder / name))
        for name, versions in here.items():
            found.setdefault(name, versions)
    return found


def python_versions(
    expected: Mapping[str, object],
    found: Mapping[str, list[tuple[str, Path]]],
    *,
    strict: bool,
    what: str,
    optional: Iterable[str] = (),
) -> Check:
    """`expected`: name -> version, or unknown; `strict`: nothing else may be there; `optional` ones may be missing."""
    faults, optional = [], set(optional)
    for name in sorted({*expected, *found} - {OURS}):
        versions = [version for version, _ in found.get(name, [])]
        wanted = expected.get(name)
        if name not in expected:
            if strict:
                faults.append(f"{name} {versions[0]} is installed, and not in the lock")
        elif not versions:
            if name not in optional:
                faults.append(f"{name} is missing" if is_unknown(wanted) else f"{name} {wanted} is missing")
        elif len(versions) > 1:
            faults.append(f"{name} is there in several versions: {', '.join(versions)}")
        elif not is_unknown(wanted) and not _same(str(wanted), versions[0]):
            faults.append(f"{name} is {versions[0]}, the lock says {wanted}")
    others = len(set(found) - set(expected) - {OURS})
    more = f"; {others} more are installed" if others else ""
    present = sum(1 for name in expected if name in found)
    return verdict("python packages", faults, f"{present} as in {what}{more}")


def _same(wanted: str, found: str) -> bool:
    """Whether two texts are one version: "1.0" and "1.0.0" are."""
    from packaging.version import InvalidVersion, Version

    try:
        return wanted == found or Version(wanted) == Version(found)
    except InvalidVersion:
        return False


def debian_versions(expected: Sequence[tuple[str, str, str]], status: bytes, *, what: str) -> Check:
    """`expected`: (name, architecture, version) of each package; `status`: dpkg's file of that name."""
    found = {}
    for stanza in status.decode(errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status", "").endswith(" installed"):
            found[fields.get("Package", "")] = (fields.get("Architecture", ""), fields.get("Version", ""))
    faults = []
    wanted = {name: (architecture, version) for name, architecture, version in expected}
    for name in sorted({*wanted, *found}):
        if name not in found:
            faults.append(f"{name} {wanted[name][1]} is missing")
        elif name not in wanted:
            faults.append(f"{name} {found[name][1]} is installed, and not in the lock")
        elif wanted[name] != found[name]:
            faults.append(f"{name} is {' '.join(reversed(found[name]))}, the lock says {wanted[name][1]}")
    return verdict("debian packages", faults, f"{len(wanted)} as in {what}")


def python_files(names: Iterable[str], found: Mapping[str, list[tuple[str, Path]]]) -> Check:
    """Every file of these packages against the hash that its RECORD has.

    Byte code is made anew; scripts name the place of Python, and an environment that is moved has others.
    """
    faults, work, unrecorded = [], list[tuple[str, Path, str]](), 0
    for name in sorted(set(names)):
        for _, info in found.get(name, [])[:1]:
            try:
                with open(info / "RECORD", encoding="utf-8", newline="") as stream:
                    rows = [row for row in csv.reader(stream) if len(row) == 3 and row[1].startswith("sha256=")]
                rows = [row for row in rows if not (_SCRIPT.match(row[0]) or row[0].endswith(".pyc"))]
            except (OSError, UnicodeDecodeError, csv.Error):
                faults.append(f"{name} has no RECORD that can be read")
                continue
            work += [(name, info.parent / row[0], row[1].removeprefix("sha256=")) for row in rows]
            unrecorded += not rows
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:  # hashlib lets go of the interpreter
        hashes = pool.map(lambda item: _sha256(item[1]), work)
        wrong: dict[str, list[str]] = {}
        for (name, path, expected), digest in zip(work, hashes, strict=True):
            if digest != expected:
                wrong.setdefault(name, []).append(f"{path.name} {'is missing' if digest is None else 'was changed'}")
    for name, files in sorted(wrong.items()):
        faults.append(f"{name}: {files[0]}" + (f", and {len(files) - 1} more files" if len(files) > 1 else ""))
    checked = verdict("python files", sorted(faults), f"{len(work):,} files as their packages' RECORDs say")
    if checked.state != FAILED and unrecorded:
        return Check(checked.name, checked.state, f"{checked.reason}; {unrecorded} packages record no hashes")
    return checked


def _sha256(path: Path) -> str | None:
    """As a RECORD writes it (urlsafe base64 without padding); None where the file is not there."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError:
        return None
    return base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
