"""Where a maintainer's commands work: the checkout with `containers/` and `requirements/`, and the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from apertus_nemo.errors import UnfitEnvironment


def checkout() -> Path:
    """The checkout that this package is run from. Raises UnfitEnvironment where it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not ((root / "pyproject.toml").is_file() and (root / "containers").is_dir()):
        raise UnfitEnvironment("images are locked, built and published from a checkout of apertus-nemo; this is none")
    return root


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Of what images are made from: `apertus-nemo/images` below XDG_CACHE_HOME, or below ~/.cache."""
    base = environment.get("XDG_CACHE_HOME")
    home = Path(environment.get("HOME") or "~").expanduser()
    return (Path(base) if base else home / ".cache") / "apertus-nemo" / "images"
