"""The presets `as_intended` and `as_published`: other values where report and code of the published runs differ."""

from __future__ import annotations

from typing import Any

import pytest

from apertus_nemo.recipe.check import find
from apertus_nemo.recipe.compose import compose
from tests.unit.recipe.given import GIVEN


def chosen(preset: str, recipe: str) -> dict[str, Any]:
    config = compose(recipe, [*GIVEN.get(recipe, []), f"+preset={preset}"]).config
    assert find(config) == []
    return {
        "xielu": config.model.xielu_tensor_parallel_gradient,
        "masking": config.data.document_masking,
        "start": config.schedule.warmup_init_lr / config.optim.lr,
    }


@pytest.mark.parametrize("recipe", ["tiny_pretrain", "apertus_8b_pretrain", "apertus_70b_pretrain"])
def test_presets(recipe: str) -> None:
    assert chosen("as_published", recipe) == {"xielu": "as_published", "masking": "causal", "start": 0.0}
    intended = chosen("as_intended", recipe)
    assert intended.pop("start") == pytest.approx(0.1)
    assert intended == {"xielu": "as_intended", "masking": "per_document"}
