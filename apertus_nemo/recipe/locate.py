"""Where the recipes that come with the package lie."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from apertus_nemo.errors import UnfitEnvironment


@lru_cache(maxsize=1)
def packaged_recipes() -> Path:
    """The folder of config groups: inside an installed wheel, else beside the package in a checkout."""
    from importlib.resources import files

    package = files("apertus_nemo")
    for candidate in (package / "resources" / "recipes", package / ".." / "recipes"):
        folder = Path(str(candidate))
        if (folder / "recipe").is_dir():
            return folder.resolve()
    raise UnfitEnvironment("the recipes of apertus-nemo are missing from its installation; install it again")
