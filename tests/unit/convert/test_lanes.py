"""Lanes by matrix products, against the plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apertus_nemo.convert.lanes import added, block_lanes, finite
from apertus_nemo.record.state_digest import bits, lanes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (3, 4096), (70, 2049), (2, 9000)])
def test_they_are_the_same(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    words = torch.randint(0, 256, (shape[0], shape[1] * dtype.itemsize), dtype=torch.uint8).view(dtype)
    plain = words.view(torch.int32 if dtype.itemsize == 4 else torch.int16).numpy()
    plain = plain.view(np.uint32 if dtype.itemsize == 4 else np.uint16)
    for row0 in (0, 131_071):
        assert block_lanes(words, row0=row0) == lanes(bits(plain), row0=row0)
    cut = shape[0] // 2
    assert added(block_lanes(words[:cut]), block_lanes(words[cut:], row0=cut)) == lanes(bits(plain))


def test_the_largest_words_are_exact() -> None:
    words = torch.full((2, 2**15), -1, dtype=torch.int16)
    assert block_lanes(words.view(torch.bfloat16)) == lanes(words.numpy().view(np.uint16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite(dtype: torch.dtype) -> None:
    assert finite(torch.empty(0, 4, dtype=dtype))
    block = torch.ones(3, 100, dtype=dtype)
    assert finite(block)
    for value in (float("nan"), float("inf"), float("-inf")):
        block[1, 7] = value
        assert not finite(block)
    assert finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))
