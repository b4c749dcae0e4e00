"""The Goldfish table and mask against the reference's values and a brute force in plain integers."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from apertus_nemo.data import goldfish

TABLE_START = [  # reference, section 3
    0.23368388414382935,
    0.4412640333175659,
    0.7411476969718933,
    0.9092718958854675,
    0.7113223075866699,
    0.0011252164840698242,
]


def test_table_has_the_published_values() -> None:
    table = goldfish.table()
    assert table.shape == (1_000_003,)
    assert table.dtype == np.float32
    assert table[:6].tolist() == TABLE_START
    assert round(float((table < 0.02).mean()), 7) == 0.0199009


def test_table_is_mersenne_twister_with_24_bits() -> None:
    words = np.random.RandomState(2971215073)._bit_generator.random_raw(goldfish.TABLE_SIZE)  # type: ignore[attr-defined]
    assert np.array_equal(goldfish.table(), ((words & 0xFFFFFF) / 2**24).astype(np.float32))


def brute_force(labels: list[int], k: int, h: int) -> list[float]:
    """The rule, one label at a time, in Python's unbounded integers."""
    table = goldfish.table()
    mask = []
    for i in range(len(labels)):
        product = 1
        for label in labels[max(0, i - h + 1) : i + 1]:
            product = (product * label) % 2**64
        signed = product - 2**64 if product >= 2**63 else product
        mask.append(0.0 if i >= h - 1 and float(table[signed % 1_000_003]) < 1 / k else 1.0)
    return mask


@pytest.mark.parametrize(("k", "h"), [(50, 50), (2, 1), (3, 13), (4, 7), (50, 64)])
@pytest.mark.parametrize("vocab_size", [7, 131072])
def test_mask_is_the_rule(k: int, h: int, vocab_size: int) -> None:
    draw = random.Random(h * k)
    labels = [draw.randrange(1, vocab_size) | 1 for _ in range(600)]  # odd: products wrap and do not vanish
    mask = goldfish.kept(np.array(labels), k=k, h=h)
    assert mask.dtype == np.float32
    assert mask.tolist() == brute_force(labels, k, h)
    assert (mask[: h - 1] == 1.0).all()
    assert 0.0 in mask


def test_keys_meet_negative_products_and_zeros() -> None:
    labels = np.array([2**40 + 1, 2**23 + 1, 3, 2**32, 2**32, 5])
    keys = goldfish.keys(labels, h=2)
    products = [int(a) * int(b) % 2**64 for a, b in itertools.pairwise(labels)]
    signed = [p - 2**64 if p >= 2**63 else p for p in products]
    assert min(signed) < 0
    assert 0 in signed
    assert keys.tolist() == [p % 1_000_003 for p in signed]


def test_rows_are_independent_and_short_ones_whole() -> None:
    rows = np.random.default_rng(3).integers(0, 5000, size=(4, 300))
    whole = goldfish.kept(rows, k=5, h=20)
    assert np.array_equal(whole, np.stack([goldfish.kept(row, k=5, h=20) for row in rows]))
    assert goldfish.kept(rows[0, :19], k=1, h=20).tolist() == [1.0] * 19


def test_agrees_with_torch_as_the_fork_computes_it() -> None:
    import torch

    labels = torch.randint(0, 131072, (4096,), generator=torch.Generator().manual_seed(1))
    keys = labels.unfold(0, 50, 1).prod(dim=-1) % 1_000_003
    dropped = torch.from_numpy(goldfish.table().copy())[keys] < 1 / 50
    expected = torch.ones(4096)
    expected[49:][dropped] = 0.0
    assert goldfish.kept(labels.numpy(), k=50, h=50).tolist() == expected.tolist()
    assert 0.01 < float(dropped.float().mean()) < 0.03
