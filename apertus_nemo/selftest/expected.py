"""What an installation is held against: the lock of an image, or the locked requirements of a checkout.

    expected = look(lock=None, root=Path("/"))
    expected.python["numpy"], expected.what        # "1.26.4", "cpu-1.0.0 for linux/amd64"

Inside an image of ours that is `/etc/apertus-nemo/lock.json` with the definition beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.image.definition import Definition, read_definition
from apertus_nemo.image.families import DEFINITION, LOCK, containers_folder
from apertus_nemo.image.lock import ImageLock, read_lock
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.python_packages import parse_requirements
from apertus_nemo.record.canonical import unknown
from apertus_nemo.record.files import reading

IN_IMAGE = Path("etc/apertus-nemo")  # below the root: lock, definition, SBOM


@dataclass(frozen=True)
class Expected:
    """What should be here."""

    what: str  # for messages
    python: Mapping[str, Any]  # name -> version; unknown where the base's is not known
    optional: frozenset[str]  # may be missing: they only put the others in place
    strict: bool  # nothing else may be installed
    debian: list[tuple[str, str, str]] | None  # (name, architecture, version); None: cannot be compared
    no_debian: str  # then why
    definition: Definition | None
    lock: ImageLock | None
    in_image: bool  # this Python is that of an image of ours


def look(lock: Path | None, *, root: Path = Path("/"), machine: str | None = None) -> Expected:
    """`lock`: a file, else that of the image in `root`, else the requirements that came with this package.

    Raises InputError for a lock that is malformed, or is for other machines.
    """
    platform = str(Platform.of_machine(machine or os.uname().machine))
    inside = root / IN_IMAGE / LOCK
    if lock is None and not inside.exists():
        return _of_requirements(machine or os.uname().machine)
    path = inside if lock is None else lock
    found = read_lock(path)
    if platform not in found.platforms:
        raise InputError(f"{path}: is a lock for {', '.join(found.platforms)}, and this machine is {platform}")
    definition = _definition(found, path.parent, root)
    in_image = inside.exists() and definition is not None and Path(sys.prefix) == root / definition.prefix.lstrip("/")
    debian = [(one.name, one.architecture, one.version) for one in found.debian(platform)]
    base = found.tree["base"]
    if not in_image:
        reason = "this is not inside the image"
    elif base["kind"] == "image":
        reason = "the base is an image, whose packages are not listed in the lock"
    else:
        reason = ""
    python: dict[str, Any] = {one.name: one.version for one in found.python(platform)}
    for name, provided in base.get("provides", {}).items():
        python[name] = _provided(provided)
    return Expected(
        what=f"the lock of {found.name} for {platform}",
        python=python,
        optional=frozenset(_installer()),
        strict=in_image and base["kind"] == "debian",
        debian=None if reason else debian,
        no_debian=reason,
        definition=definition,
        lock=found,
        in_image=in_image,
    )


def _provided(entry: Any) -> Any:
    """The version that a base has of a package; unknown where its definition does not say."""
    version = entry.get("version") if isinstance(entry, Mapping) else entry
    return version if isinstance(version, str) else unknown("the base's")


def _definition(lock: ImageLock, folder: Path, root: Path) -> Definition | None:
    """Beside the lock, else in the image, else of this package: the first that the lock was resolved from."""
    family = lock.tree["family"]
    for path in (folder / DEFINITION, root / IN_IMAGE / DEFINITION, containers_folder() / family / DEFINITION):
        if path.is_file():
            found = read_definition(path)
            if f"sha256:{found.digest}" == lock.tree["definition_digest"]:
                return found
    return None


def _requirements() -> Path:
    """The folder of locked requirements: beside the folder of families, in a checkout and in a wheel."""
    return containers_folder().parent / "requirements"


def _read(name: str) -> dict[str, str]:
    path = _requirements() / name
    with reading(path):
        text = path.read_text()
    return {one.name: one.version for one in parse_requirements(text, what=str(path))}


def _installer() -> dict[str, str]:
    return _read("bootstrap.txt") if (_requirements() / "bootstrap.txt").is_file() else {}


def _of_requirements(machine: str) -> Expected:
    """Of the checkout, or of what a wheel carries of it; torch with CUDA where that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        cuda = "+cpu" not in version("torch")
    except PackageNotFoundError:
        cuda = False
    torch = f"torch-cuda-linux-{machine}.txt"
    if not cuda or not (_requirements() / torch).is_file():
        torch = f"torch-linux-{machine}.txt"
    names = [torch, f"linux-{machine}.txt"]
    for name in names:
        if not (_requirements() / name).is_file():
            raise InputError(f"there are no locked requirements for {machine}: give the lock of an image with --lock")
    definition = read_definition(containers_folder() / "cpu" / DEFINITION)
    return Expected(
        what=f"requirements/{names[0]} and {names[1]}",
        python={key: value for name in names for key, value in _read(name).items()},
        optional=frozenset(_installer()),
        strict=False,
        debian=None,
        no_debian="this is no image: there is no /etc/apertus-nemo/lock.json",
        definition=definition,
        lock=None,
        in_image=False,
    )
