"""Dry builds of ranks, in forked processes that have imported Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def built(rank: int, world_size: int, *, recipes: str | None, overrides: list[str], ranks: list[int]) -> Any:
    """What `plan --build` finds of these ranks of the planned run."""
    from apertus_nemo.plan.build import compare
    from apertus_nemo.recipe.check import check
    from apertus_nemo.recipe.compose import compose

    run = compose(overrides=overrides, recipe_dirs=[Path(recipes)] if recipes else []).config
    check(run)
    return [compare(run, each) for each in ranks]
