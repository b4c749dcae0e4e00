"""What software this process would run, apart from our own source (`record/source.py`).

    packages(cache=Path("~/.cache/apertus-nemo/packages.json").expanduser())
    # {"numpy": {"sha256": "...", "version": "1.26.4"}, ...}, sorted
    interpreter()    # {"build": ..., "implementation": "CPython", "libc": "glibc 2.36", "version": "3.11.2"}

A package's hash is taken over the files themselves, not over what their RECORD says of them. Hashing two gigabytes
takes seconds, so digests are kept: a package is hashed again when the size, the modification time or the change time of
any of its files is another one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from apertus_nemo.errors import ApertusError, UnfitEnvironment
from apertus_nemo.record.canonical import dumps, sha256_hex, unknown
from apertus_nemo.record.files import file_sha256, write_atomic

_DIST_INFO = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)\.dist-info\Z")
_CACHE_FORMAT = 1
_START_LIMIT_S = 60.0  # of an empty Python, on a slow network file system
_MAX_CACHE_BYTES = 64 * 2**20

# Distributions that no result depends on; a lock does not pin them, so that a tool may be added or moved on.
NOT_PINNED = {
    "aiobotocore": "of s3fs",
    "aioitertools": "of s3fs",
    "apertus-nemo": "our own source is a field of its own",
    "arrow": "of isoduration",
    "ast-serialize": "of mypy",
    "blinker": "of flask",
    "boolean-py": "of license-expression",
    "boto3": "of moto",
    "botocore": "of s3fs",
    "cwevals": "of wandb",
    "cyclonedx-python-lib": "writes the bill of materials of an image",
    "defusedxml": "of py-serializable",
    "distro": "of wandb",
    "flask": "serves moto",
    "flask-cors": "of moto",
    "fqdn": "of jsonschema",
    "hypothesis": "generates cases for tests",
    "iniconfig": "of pytest",
    "isoduration": "of jsonschema",
    "itsdangerous": "of flask",
    "jmespath": "of botocore",
    "jsonpointer": "of jsonschema",
    "lark": "of rfc3987-syntax",
    "librt": "of mypy",
    "license-expression": "of cyclonedx-python-lib",
    "moto": "an S3 server for tests",
    "mypy": "checks types",
    "opentelemetry-exporter-http-transport": "of wandb",
    "opentelemetry-exporter-otlp-common": "of wandb",
    "opentelemetry-exporter-otlp-proto-common": "of wandb",
    "opentelemetry-exporter-otlp-proto-http": "of wandb",
    "packageurl-python": "of cyclonedx-python-lib",
    "pip": "puts packages in place",
    "plotly": "draws in reports",
    "py-partiql-parser": "of moto",
    "py-serializable": "of cyclonedx-python-lib",
    "pytest": "runs tests",
    "pytest-timeout": "of pytest",
    "responses": "of moto",
    "rfc3339-validator": "of jsonschema",
    "rfc3986-validator": "of jsonschema",
    "rfc3987-syntax": "of jsonschema",
    "ruff": "checks style",
    "s3fs": "copies records; no run imports it",
    "s3transfer": "of boto3",
    "sortedcontainers": "of hypothesis",
    "spython": "reads definition files of Apptainer in tests",
    "tzdata": "of arrow; ranks run in UTC",
    "uri-template": "of jsonschema",
    "uv": "puts packages in place",
    "wandb": "shows curves of values that it is given; none comes back",
    "webcolors": "of jsonschema",
    "xmltodict": "of moto",
}

# Of a distribution's own notes, what tells how and where it was put in place; the rest is pinned.
_NOTES = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "uv_build.json"})


@dataclass(frozen=True)
class _Distribution:
    """An installed distribution, found by the name of its folder."""

    name: str  # normalised
    version: str
    folder: Path  # site-packages
    info: str  # name of its .dist-info; "" where an old tool left none


def interpreter() -> dict[str, str]:
    """The Python that runs this, by version and build, and the C library, whose functions enter arithmetic."""
    return {
        "build": " ".join(sys.version.split()),
        "implementation": platform.python_implementation(),
        "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        "version": platform.python_version(),
    }


@cache
def import_path() -> tuple[str, ...]:
    """Where ranks import from: sys.path of a new process, without PYTHONPATH, the user's packages and this folder.

    This process's own is no answer: libraries put folders of their own on it as they are imported.
    Raises UnfitEnvironment where Python cannot be started.
    """
    script = "import json, sys; print(json.dumps(sys.path))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-s", "-c", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=_START_LIMIT_S,
        )
        return tuple(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise UnfitEnvironment(f"{sys.executable} could not be started: {error}") from error


def packages(path: Sequence[str] | None = None, *, cache: Path | None = None) -> dict[str, Any]:
    """Installed distributions on `path` (default: what ranks import from) but NOT_PINNED, sorted by normalised name.

    Each is {"sha256", "version"}; the hash is SHA-256 over the canonical JSON of [[file, SHA-256], ...], sorted, for
    every file that RECORD names but byte code, scripts (they hold the place of Python) and installers' notes. A file
    that is not there has null. Where two folders of the path hold one distribution, the first wins, as on import.
    `cache` keeps digests between calls; it is made, and ignored where it is unreadable or cannot be written.
    """
    found = _distributions(import_path() if path is None else path)
    known = _read_cache(cache)
    kept: dict[str, Any] = {}
    stale: list[tuple[_Distribution, list[str], str]] = []
    result: dict[str, Any] = {}
    for distribution in found:
        key = str(distribution.folder / distribution.info)
        old = known.get(key)
        record = _record_stamp(distribution)
        if record is None:
            reason = unknown("its installer left no list of its files (RECORD)")
            result[distribution.name] = {"sha256": reason, "version": distribution.version}
            continue
        if old is not None and old["record"] == record:
            names = old["files"].split("\n")
        else:
            names, old = _files(distribution), None
        stamp = _stamp(distribution.folder, names)
        if old is not None and old["stamp"] == stamp:
            result[distribution.name] = {"sha256": old["sha256"], "version": distribution.version}
            kept[key] = old
        else:
            stale.append((distribution, names, stamp))
    for (distribution, names, stamp), digest in zip(stale, _digests(stale), strict=True):
        result[distribution.name] = {"sha256": digest, "version": distribution.version}
        kept[str(distribution.folder / distribution.info)] = {
            "files": "\n".join(names),
            "record": _record_stamp(distribution),
            "sha256": digest,
            "stamp": stamp,
        }
    if stale:
        _write_cache(cache, {**known, **kept})
    return dict(sorted(result.items()))


def _distributions(path: Sequence[str]) -> list[_Distribution]:
    """By the names of `.dist-info` folders (packaging specification "Recording installed projects"), reading none."""
    found: dict[str, _Distribution] = {}
    for entry in path:
        folder = Path(entry or ".")
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        here: dict[str, _Distribution] = {}
        for name in names:
            if match := _DIST_INFO.match(name):
                normal = _normal(match["name"])
                here[normal] = _Distribution(normal, match["version"], folder, name)
            elif name.endswith(".egg-info"):
                parts = name.removesuffix(".egg-info").split("-")
                normal = _normal(parts[0])
                here.setdefault(normal, _Distribution(normal, parts[1] if len(parts) > 1 else "unknown", folder, ""))
        for normal, distribution in here.items():
            found.setdefault(normal, distribution)
    return [found[name] for name in sorted(found) if name not in NOT_PINNED]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _record_stamp(distribution: _Distribution) -> str | None:
    """Size and times of its RECORD; None where it has none."""
    try:
        found = os.stat(distribution.folder / distribution.info / "RECORD") if distribution.info else None
    except OSError:
        found = None
    return None if found is None else f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _files(distribution: _Distribution) -> list[str]:
    """The files of a distribution that are pinned, relative to its folder, sorted."""
    with open(distribution.folder / distribution.info / "RECORD", encoding="utf-8", newline="") as stream:
        names = {row[0] for row in csv.reader(stream) if row}
    pinned = []
    for name in names:
        folder, _, last = name.rpartition("/")
        outside = name.startswith(("../", "/"))
        script = outside and os.path.basename(folder) in ("bin", "Scripts")
        note = folder == distribution.info and last in _NOTES
        if not (script or note or last.endswith(".pyc")) and "\n" not in name:
            pinned.append(name)
    return sorted(pinned)


def _stamp(folder: Path, names: Sequence[str]) -> str:
    """Changes with the size or a time of any file."""
    prefix, stat, parts = f"{folder}/", os.stat, []
    for name in names:
        try:
            found = stat(prefix + name)
            parts.append(f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}")
        except OSError:
            parts.append("-")
    return sha256_hex("\n".join(parts).encode())


def _digests(stale: Sequence[tuple[_Distribution, list[str], str]]) -> list[str]:
    """Hash the files of several distributions, on all processors."""

    def one(path: Path) -> str | None:
        try:
            return file_sha256(path)
        except ApertusError:
            return None

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:  # hashlib lets go of the interpreter
        hashes = [pool.map(one, [item.folder / name for name in names]) for item, names, _ in stale]
        return [
            sha256_hex(dumps([list(pair) for pair in zip(names, found, strict=True)]))
            for (_, names, _), found in zip(stale, hashes, strict=True)
        ]


def _read_cache(path: Path | None) -> dict[str, Any]:
    """What was kept; nothing where that is not what this version writes."""
    if path is None:
        return {}
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_CACHE_BYTES)
        head, _, body = data.partition(b"\n")
        if head.decode() != f"{_CACHE_FORMAT} {hashlib.sha256(body).hexdigest()}":
            return {}
        tree = json.loads(body)
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _write_cache(path: Path | None, entries: Mapping[str, Any]) -> None:
    """Keep the digests of what still is there; a cache that cannot be written is none."""
    if path is None:
        return
    body = json.dumps({key: entries[key] for key in sorted(entries) if os.path.isdir(key)}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{_CACHE_FORMAT} {hashlib.sha256(body).hexdigest()}\n".encode() + body)
    except (OSError, ApertusError):
        pass
