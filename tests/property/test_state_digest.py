"""The state digest: numpy, torch and Python integers agree, blocks add up, and what was argued of accidents is seen."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apertus_nemo.errors import ApertusError, Differs
from apertus_nemo.model.layout import Piece, pieces, published_shapes
from apertus_nemo.recipe.schema import ModelConfig
from apertus_nemo.record import state_digest as reference
from apertus_nemo.record.state import StateDigest
from apertus_nemo.training import digest as kernel

MASK = 2**64 - 1
SPEC = Path(__file__).resolve().parents[2] / "docs" / "state-digest.md"
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Bit patterns that arithmetic on floats would not keep: NaN with payloads, infinities, -0.0, denormals, extremes.
SPECIAL_32 = [0, 1, 0x80000000, 0x80000001, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00001, 0xFFFFFFFF, 0x007FFFFF]
SPECIAL_16 = [0, 1, 0x8000, 0x8001, 0x7F80, 0xFF80, 0x7F81, 0x7C00, 0xFC00, 0x7C01, 0x7FC1, 0xFFFF, 0x03FF]
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def splitmix64(seed: int, number: int) -> int:
    """The specification, in Python's integers."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@lru_cache(maxsize=100_000)
def weight(lane: int, axis: int, index: int) -> int:
    return splitmix64(splitmix64(0, 2 * lane + axis), index) | 1


def by_hand(bits: np.ndarray, row0: int = 0, col0: int = 0) -> tuple[int, ...]:
    return tuple(
        sum(
            int(bits[r, c]) * weight(lane, 0, row0 + r) * weight(lane, 1, col0 + c)
            for r in range(bits.shape[0])
            for c in range(bits.shape[1])
        )
        & MASK
        for lane in range(4)
    )


def as_torch(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """Bits as a tensor of `dtype`, without any arithmetic on them."""
    signed = bits.astype(np.uint32 if dtype == "float32" else np.uint16)
    signed = signed.view(np.int32 if dtype == "float32" else np.int16)
    return torch.from_numpy(signed.copy()).view(TORCH[dtype])


@st.composite
def matrices(draw: st.DrawFn, largest: int = 12) -> tuple[np.ndarray, str]:
    dtype = draw(st.sampled_from(sorted(TORCH)))
    rows, cols = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    wide = dtype == "float32"
    special = SPECIAL_32 if wide else SPECIAL_16
    element = st.one_of(st.sampled_from(special), st.integers(0, 2**32 - 1 if wide else 2**16 - 1))
    values = draw(st.lists(element, min_size=rows * cols, max_size=rows * cols))
    return np.array(values, dtype=np.uint32 if wide else np.uint16).reshape(rows, cols), dtype


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs for seed 1234567, as listed with implementations in many languages (Rosetta Code).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567, i) for i in range(4)] == expected
    assert reference.splitmix64(1234567, 0, 4).tolist() == expected


def test_streams_are_far_apart() -> None:
    """Seeds whose distance in steps of the generator is large: no two streams share a weight."""
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    seeds = [reference.stream_seed(lane, axis) for lane in range(4) for axis in range(2)]
    for i, one in enumerate(seeds):
        for other in seeds[:i]:
            steps = (one - other) * inverse & MASK
            assert min(steps, 2**64 - steps) > 2**56


def test_the_example_of_the_specification() -> None:
    text = SPEC.read_text()
    bits = np.array([[0x3F800000, 0x40000000], [0x80000000, 0x7FC00001]], dtype=np.uint32)
    lanes = by_hand(bits)
    assert " ".join(f"{lane:016x}" for lane in lanes) in text
    tensor = reference.tensor_digest("w", "weight", bits.view(np.float32))
    assert tensor.lanes == lanes
    listed = json.dumps([["w", "weight", "float32", [2, 2], [f"{lane:016x}" for lane in lanes]]], separators=(",", ":"))
    digest = hashlib.sha256(listed.encode()).hexdigest()
    assert StateDigest.of(0, [tensor]).digest == digest
    assert re.search(rf"^`{digest}`", text, re.MULTILINE)


@QUICK
@given(matrices(6), st.integers(0, 2**40), st.integers(0, 2**40))
def test_three_implementations_agree(matrix: tuple[np.ndarray, str], row0: int, col0: int) -> None:
    bits, dtype = matrix
    expected = by_hand(bits, row0, col0)
    assert reference.lanes(bits, row0, col0) == expected
    tensor = as_torch(bits, dtype)
    assert kernel.lanes(tensor, row0, col0) == expected
    assert kernel.lanes(tensor.t().contiguous().t(), row0, col0) == expected  # strides do not matter


@QUICK
@given(matrices(), st.data())
def test_blocks_add_up(matrix: tuple[np.ndarray, str], data: st.DataObject) -> None:
    bits, dtype = matrix
    rows, cols = bits.shape
    cut_rows = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    cut_cols = sorted({0, cols, *data.draw(st.lists(st.integers(0, cols), max_size=3))})
    tensor = as_torch(bits, dtype)
    total = [0, 0, 0, 0]
    for top, bottom in itertools.pairwise(cut_rows):
        for left, right in itertools.pairwise(cut_cols):
            part = kernel.lanes(tensor[top:bottom, left:right], top, left)
            total = [(one + other) & MASK for one, other in zip(total, part, strict=True)]
    assert tuple(total) == reference.lanes(bits)


@QUICK
@given(matrices(), st.data())
def test_one_changed_element_changes_every_lane(matrix: tuple[np.ndarray, str], data: st.DataObject) -> None:
    bits, dtype = matrix
    row, col = (data.draw(st.integers(0, size - 1)) for size in bits.shape)
    change = data.draw(st.integers(1, 2 ** (32 if dtype == "float32" else 16) - 1))
    changed = bits.copy()
    changed[row, col] ^= change
    before, after = kernel.lanes(as_torch(bits, dtype)), kernel.lanes(as_torch(changed, dtype))
    assert all(one != other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(("rows", "cols"), [(1, 200_000), (200_000, 1), (3, 70_001), (70_001, 3), (513, 515)])
@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_blocks_larger_than_a_chunk(rows: int, cols: int, dtype: str) -> None:
    generator = np.random.default_rng(rows)
    bits = generator.integers(0, 2**32 if dtype == "float32" else 2**16, (rows, cols), dtype=np.uint32)
    assert kernel.lanes(as_torch(bits, dtype), 5, 7) == reference.lanes(bits, 5, 7)


def test_more_dimensions_count_as_rows_and_a_scalar_is_one_element() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert reference.lanes(reference.bits(array)) == reference.lanes(reference.bits(array.reshape(6, 4)))
    assert reference.bits(np.float32(2.0).reshape(())).shape == (1, 1)
    assert reference.bits(np.ones(5, dtype=np.float16)).shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ApertusError, match="has no element of dtype"):
        kernel.lanes(torch.ones(2, 2, dtype=dtype))
    with pytest.raises(ApertusError, match="has no element of dtype"):
        reference.bits(torch.ones(2, 2, dtype=dtype).numpy())


def test_sign_flips_miss_as_rarely_as_argued() -> None:
    """The bound m * 2^(1 - m), seen where m is small: signs flipped on rectangles, lanes taken modulo 2^(31 + m)."""
    generator = np.random.default_rng(7)
    trials, m = 20_000, 8
    a, b = (reference.weights(0, axis, 0, 4096).astype(object) for axis in (0, 1))
    missed = 0
    for _ in range(trials):
        rows, cols = (generator.choice(4096, 2, replace=False) for _ in range(2))
        signs = generator.choice([-1, 1], 4)
        total = sum(
            int(s) * 2**31 * a[r] * b[c] for s, (r, c) in zip(signs, ((r, c) for r in rows for c in cols), strict=True)
        )
        missed += total % 2 ** (31 + m) == 0
    bound = m * 2 ** (1 - m)
    assert missed / trials < bound + 5 * math.sqrt(bound / trials)
    rectangles = 0
    for _ in range(trials):
        (r, s), (c, d) = (generator.choice(4096, 2, replace=False) for _ in range(2))
        rectangles += (2**31 * (a[r] - a[s]) * (b[c] - b[d])) % 2 ** (31 + m) == 0
    assert abs(rectangles / trials - bound) < 5 * math.sqrt(bound / trials)  # the worst case reaches the bound


MODEL = ModelConfig(
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=10,
)
PARAMETERS = {
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
    "input_layernorm.weight",
    "mlp.activation_func.alpha_p",
}


def local_parameter(found: tuple[Piece, ...], published: dict[str, np.ndarray], dtype: str) -> torch.Tensor:
    """What a rank holds, cut from the whole tensors by numpy alone."""
    rows = max(piece.local_rows[1] for piece in found)
    cols = max(piece.local_cols[1] for piece in found)
    local = np.zeros((rows, cols), dtype=np.uint32)
    for piece in found:
        whole = reference.as_matrix(published[piece.name])
        block = whole[slice(*piece.rows), slice(*piece.cols)]
        local[slice(*piece.local_rows), slice(*piece.local_cols)] = block
    tensor = as_torch(local, dtype)
    return tensor[0] if len(found[0].shape) == 1 else tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp_size", [1, 2])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_cut_gives_the_digest_of_the_whole(tp_size: int, dtype: str, data: st.DataObject) -> None:
    """Parameters cut over TP, their states cut further into flat ranges anywhere: the sum is that of the whole."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    high = 2**32 if dtype == "float32" else 2**16
    names = {
        piece.name
        for parameter in PARAMETERS
        for piece in pieces(f"decoder.layers.0.{parameter}", MODEL, tp_rank=0, tp_size=1, layer_offset=1)
    }
    shapes = {name: shape for name, shape in published_shapes(MODEL).items() if name in names}
    published = {name: generator.integers(0, high, shape, dtype=np.uint32) for name, shape in shapes.items()}
    ranks = []
    for tp_rank in range(tp_size):
        found: list[kernel.Contribution] = []
        shards: list[list[kernel.Contribution]] = [[], []]
        for parameter in sorted(PARAMETERS):
            held = pieces(f"decoder.layers.0.{parameter}", MODEL, tp_rank=tp_rank, tp_size=tp_size, layer_offset=1)
            tensor = local_parameter(held, published, dtype).requires_grad_(True)
            found += kernel.parameter_contributions(tensor, held, "weight")
            replicated = parameter in ("input_layernorm.weight", "mlp.activation_func.alpha_p")
            cut = tensor.numel() // 2 if replicated else data.draw(st.integers(0, tensor.numel()))
            flat = tensor.detach().reshape(-1)
            for owner, (start, stop) in enumerate(((0, cut), (cut, tensor.numel()))):
                shards[owner] += kernel.shard_contributions(flat[start:stop], start, tensor.shape, held, "exp_avg_slow")
        ranks += [found + shards[0], found + shards[1]]
    merged = kernel.merge(ranks, expected=shapes, kinds=("weight", "exp_avg_slow"))
    width = np.uint32 if dtype == "float32" else np.uint16
    for name, array in published.items():
        for kind in ("weight", "exp_avg_slow"):
            expected = reference.tensor_digest(name, kind, array.astype(width), dtype=dtype)
            assert merged[name, kind] == expected
    assert len(merged) == 2 * len(shapes)


def whole(name: str, tensor: torch.Tensor) -> tuple[Piece, ...]:
    rows, cols = (1, tensor.numel()) if tensor.ndim < 2 else tuple(tensor.shape)
    return (Piece(name, tuple(tensor.shape), (0, rows), (0, cols), (0, rows), (0, cols)),)


def test_rows_that_no_piece_names_are_padding() -> None:
    tensor = torch.arange(20.0).reshape(5, 4)
    piece = Piece("w", (3, 4), (0, 3), (0, 4), (0, 3), (0, 4))
    (found,) = kernel.parameter_contributions(tensor, (piece,), "weight")
    assert found.lanes == reference.lanes(reference.bits(tensor[:3].numpy()))
    parts = [
        item
        for start, stop in ((0, 6), (6, 20))
        for item in kernel.shard_contributions(tensor.reshape(-1)[start:stop], start, (5, 4), (piece,), "weight")
    ]
    merged = kernel.merge([parts], expected={"w": (3, 4)}, kinds=("weight",))
    assert merged["w", "weight"].lanes == found.lanes


def test_weights_of_32_bits_are_their_own_master() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    for dtype, kinds in ((torch.float32, {"weight"}), (torch.bfloat16, {"weight", "master"})):
        found = kernel.parameter_contributions(tensor.to(dtype), whole("w", tensor), "weight")
        if dtype == torch.bfloat16:
            with pytest.raises(ApertusError, match=r"w \(master\): 0 of 6 elements"):
                kernel.merge([found], expected={"w": (2, 3)}, kinds=("weight", "master"))
            found += kernel.parameter_contributions(tensor, whole("w", tensor), "master")
        merged = kernel.merge([found], expected={"w": (2, 3)}, kinds=("weight", "master"))
        assert {kind for _, kind in merged} == kinds


def test_replicas_that_drifted_are_named() -> None:
    one, other = torch.ones(4), torch.ones(4)
    other[2] = torch.nextafter(other[2], torch.tensor(2.0))
    ranks = [kernel.parameter_contributions(t, whole("model.norm.weight", t), "weight") for t in (one, one, other)]
    with pytest.raises(
        Differs, match=r"model.norm.weight \(weight\): ranks 0 and 2 hold different bits .* columns 0 to 3"
    ):
        kernel.merge(ranks, expected={"model.norm.weight": (4,)}, kinds=("weight",))


def test_gaps_overlaps_and_strangers_are_our_own_fault() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    flat, held, expected = tensor.reshape(-1), whole("w", tensor), {"w": (3, 4)}

    def shards(*ranges: tuple[int, int]) -> list[list[kernel.Contribution]]:
        return [kernel.shard_contributions(flat[a:b], a, (3, 4), held, "weight") for a, b in ranges]

    complete = kernel.merge(shards((0, 5), (5, 12)), expected=expected, kinds=("weight",))
    assert complete["w", "weight"].lanes == kernel.lanes(tensor)
    with pytest.raises(ApertusError, match=r"w \(weight\): 11 of 12 elements"):
        kernel.merge(shards((0, 5), (6, 12)), expected=expected, kinds=("weight",))
    with pytest.raises(ApertusError, match="13 of 12 elements"):
        kernel.merge(shards((0, 6), (5, 12)), expected=expected, kinds=("weight",))
    with pytest.raises(ApertusError, match="overlap"):
        kernel.merge(shards((0, 4), (1, 3), (4, 10)), expected=expected, kinds=("weight",))
    with pytest.raises(ApertusError, match="0 of 12 elements"):
        kernel.merge(shards((0, 12)), expected=expected, kinds=("weight", "exp_avg_sq"))
    with pytest.raises(ApertusError, match=r"rank 0 holds w \(weight\) \(3, 4\), which is not expected"):
        kernel.merge(shards((0, 12)), expected={"v": (3, 4)}, kinds=("weight",))
    with pytest.raises(ApertusError, match="which is not expected"):
        kernel.merge(shards((0, 12)), expected={"w": (4, 3)}, kinds=("weight",))
    with pytest.raises(ApertusError, match="are no shard"):
        kernel.shard_contributions(flat, 1, (3, 4), held, "weight")
    mixed = [kernel.shard_contributions(flat[:4], 0, (3, 4), held, "weight")]
    mixed += [kernel.shard_contributions(flat[4:].to(torch.bfloat16), 4, (3, 4), held, "weight")]
    with pytest.raises(ApertusError, match="held as float32 and as bfloat16"):
        kernel.merge(mixed, expected=expected, kinds=("weight",))
