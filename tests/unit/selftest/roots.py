"""The root folder of an image of ours, with two packages of each kind: what the self-test looks at."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

from apertus_nemo.image.debian import DebianPackage
from apertus_nemo.image.definition import parse_definition
from apertus_nemo.image.lock import ImageLock, make_lock, platform_entry
from apertus_nemo.image.python_packages import PythonPackage

DEFINITION = f"""\
schema_version = 1
family = "cpu"
version = "1.2.3"
date = 2026-11-25
title = "An example"
machine = "any"
platforms = ["linux/amd64", "linux/arm64"]

[base]
kind = "debian"
release = "bookworm"
suites = [["debian", "bookworm"]]

[debian]
packages = ["libc6"]

[python]
version = "{sys.version_info[0]}.{sys.version_info[1]}"
prefix = "/opt/apertus-nemo"
installer = "requirements/bootstrap.txt"

[python.requirements]
"linux/amd64" = ["requirements/a.txt"]
"linux/arm64" = ["requirements/a.txt"]

[selftest]
imports = ["json"]
"""
PACKAGES = {"numpy": "1.26.4", "torch": "2.13.0+cpu"}
DEBIAN = {"libc6": "2.36-9+deb12u13", "tzdata": "2026a-0+deb12u1"}


def lock() -> ImageLock:
    """That of PACKAGES and DEBIAN."""
    entry = platform_entry(
        base=None,
        debian=[DebianPackage(name, version, "amd64", "a.deb", "0" * 64, 1) for name, version in DEBIAN.items()],
        python=[PythonPackage(name, version, f"{name}.whl", "0" * 64) for name, version in PACKAGES.items()],
        requirements={},
    )
    definition = parse_definition(DEFINITION.encode(), what="image.toml")
    return make_lock(
        definition,
        base={"kind": "debian", "release": "bookworm"},
        platforms={"linux/amd64": entry, "linux/arm64": entry},
        conflicts=[],
    )


def site(root: Path) -> Path:
    """Where its Python packages are."""
    return root / "opt/apertus-nemo/lib/python3/site-packages"


def install(folder: Path, name: str, version: str) -> None:
    """A package of one module, as an installer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = f"version = '{version}'\n".encode()
    (folder / f"{name}.py").write_bytes(content)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    (info / "RECORD").write_text(f"{name}.py,sha256={digest},{len(content)}\n{info.name}/RECORD,,\n")


def dpkg_status(packages: Mapping[str, str]) -> str:
    """As dpkg keeps it, with a package that was removed."""
    stanzas = [
        f"Package: {name}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {version}\nEssential: x\n"
        for name, version in packages.items()
    ]
    gone = "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    return "\n".join([*stanzas, gone])


def make_root(
    root: Path,
    *,
    python: Mapping[str, str] = PACKAGES,
    debian: Mapping[str, str] = DEBIAN,
    ours: ImageLock | None = None,
) -> Path:
    """The folder, with `ours` as its lock."""
    inside = root / "etc/apertus-nemo"
    inside.mkdir(parents=True)
    (inside / "image.toml").write_text(DEFINITION)
    (inside / "lock.json").write_bytes((ours or lock()).to_bytes())
    for name, version in python.items():
        install(site(root), name, version)
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(dpkg_status(debian))
    return root
