"""Layers that are computed again in the backward pass give the bits of layers that were kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.runs import STEPS, Run


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2_sp", marks=pytest.mark.full)])
def test_the_same_bits(runs: Callable[..., Run], layout: str) -> None:
    kept, again = runs(layout), runs(layout, "parallel.recompute=full")
    assert again.steps == kept.steps
    for step in (0, STEPS):
        assert again.directory.state(step).read_bytes() == kept.directory.state(step).read_bytes()


def test_documents_are_masked_again(runs: Callable[..., Run]) -> None:
    masked = "data.document_masking=per_document"
    kept, again = runs("one", masked), runs("one", masked, "parallel.recompute=full")
    assert again.steps == kept.steps
    assert kept.steps != runs("one").steps
