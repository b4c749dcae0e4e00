"""The lanes of the state digest in torch, and their sum over the ranks of a run (docs/state-digest.md).

    found = parameter_contributions(parameter, pieces(...), kind="weight")
    found += shard_contributions(exp_avg, start, local_shape, pieces(...), kind="exp_avg_fast")
    tensors = collect(found, expected=published_shapes(model), kinds=("weight", "exp_avg_fast"), group=gloo)
    StateDigest.of(step, tensors.values())

Every rank passes whatever it holds, replicas included: blocks that several ranks hold must have equal bits and count
once, and the blocks of a tensor must cover it exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from apertus_nemo.errors import ApertusError, Differs
from apertus_nemo.model.layout import Piece
from apertus_nemo.record.state import LANES, Lanes, TensorDigest

Range = tuple[int, int]  # [start, stop)

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_CHUNK_ELEMENTS = {"cpu": 2**16}  # in the processor's cache
_CHUNK_ELEMENTS_DEVICE = 2**21  # 16 MiB of 64-bit words, in two copies
_CHUNK_SIDE = 2**16  # rows or columns: bounds the memory of their weights

_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without the sign."""
    return torch.bitwise_and(z >> bits, 2 ** (64 - bits) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    return z ^ _shift(z, 31)


def _weights(axis: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Odd weights of rows (axis 0) or columns (axis 1), int64 of shape [LANES, stop - start]."""
    numbers = torch.arange(axis, 2 * LANES, 2, dtype=torch.int64, device=device) + 1
    seeds = _mix(numbers * _signed(_GAMMA))
    index = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device)
    return _mix(seeds[:, None] + index[None, :] * _signed(_GAMMA)) | 1


def _bits(block: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the block viewed as signed integers of its width, mask that takes the sign extension away)."""
    if block.dtype not in _DTYPES:
        raise ApertusError(f"the state digest has no element of dtype {block.dtype}: float32, bfloat16, float16 only")
    wide = block.element_size() == 4
    return block.detach().view(torch.int32 if wide else torch.int16), 0xFFFFFFFF if wide else 0xFFFF


@torch.no_grad()
def lane_sums(block: torch.Tensor, row0: int = 0, col0: int = 0) -> torch.Tensor:
    """The lanes of a block [rows, columns] whose first element is at (row0, col0): int64 [LANES] on its device.

    float32, bfloat16 or float16, any strides. Integer arithmetic modulo 2^64: the order of the sums does not matter.
    Needs at most 64 MiB beside the block.
    """
    words, mask = _bits(block)
    rows, cols = words.shape
    total = torch.zeros(LANES, dtype=torch.int64, device=block.device)
    limit = _CHUNK_ELEMENTS.get(block.device.type, _CHUNK_ELEMENTS_DEVICE)
    width = max(1, min(cols, limit, _CHUNK_SIDE))
    height = max(1, min(limit // width, _CHUNK_SIDE))
    for left in range(0, cols, width):
        right = min(left + width, cols)
        col_weights = _weights(1, col0 + left, col0 + right, block.device)
        for top in range(0, rows, height):
            bottom = min(top + height, rows)
            row_weights = _weights(0, row0 + top, row0 + bottom, block.device)
            chunk = words[top:bottom, left:right].to(torch.int64).bitwise_and_(mask)
            sums = torch.stack([(chunk * col_weights[lane]).sum(1) for lane in range(LANES)])
            total += (sums * row_weights).sum(1)
    return total


def lanes(block: torch.Tensor, row0: int = 0, col0: int = 0) -> Lanes:
    """As `lane_sums`, as Python integers in [0, 2^64)."""
    first, second, third, fourth = (lane % 2**64 for lane in lane_sums(block, row0, col0).tolist())
    return first, second, third, fourth


@dataclass(frozen=True)
class Contribution:
    """The lanes of one block of a published tensor, held by one rank."""

    name: str
    kind: str  # one of record.state.KINDS
    dtype: str
    shape: tuple[int, ...]  # of the whole published tensor
    rows: Range
    cols: Range
    lanes: Lanes


def parameter_contributions(tensor: torch.Tensor, pieces: Sequence[Piece], kind: str) -> list[Contribution]:
    """What a whole local parameter (or a state of its shape) contributes; rows that no piece names are padding."""
    matrix = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])
    return _contributions(((matrix, 0, 0),), pieces, kind, tensor.dtype)


def shard_contributions(
    flat: torch.Tensor, start: int, local_shape: Sequence[int], pieces: Sequence[Piece], kind: str
) -> list[Contribution]:
    """What a shard contributes: `flat` holds the elements from `start` on of the local parameter, row by row."""
    width = local_shape[-1] if len(local_shape) > 1 else _size(local_shape)
    if flat.ndim != 1 or start < 0 or start + flat.numel() > _size(local_shape):
        raise ApertusError(f"elements {start} to {start + flat.numel()} are no shard of a parameter {local_shape}")
    return _contributions(_rectangles(flat, start, width), pieces, kind, flat.dtype)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _rectangles(flat: torch.Tensor, start: int, width: int) -> Iterator[tuple[torch.Tensor, int, int]]:
    """A flat range as blocks of the local matrix: the rest of its first row, whole rows, the beginning of its last."""
    done, count = 0, flat.numel()
    while done < count:
        row, col = divmod(start + done, width)
        whole = (count - done) // width if col == 0 else 0
        take = whole * width if whole else min(width - col, count - done)
        yield flat[done : done + take].view(max(1, whole), -1), row, col
        done += take


def _contributions(
    blocks: Iterable[tuple[torch.Tensor, int, int]], pieces: Sequence[Piece], kind: str, dtype: torch.dtype
) -> list[Contribution]:
    found: list[tuple[Piece, Range, Range]] = []
    sums: list[torch.Tensor] = []
    for block, row, col in blocks:
        for piece in pieces:
            top, bottom = max(row, piece.local_rows[0]), min(row + block.shape[0], piece.local_rows[1])
            left, right = max(col, piece.local_cols[0]), min(col + block.shape[1], piece.local_cols[1])
            if top >= bottom or left >= right:
                continue
            down, along = piece.rows[0] - piece.local_rows[0], piece.cols[0] - piece.local_cols[0]
            rows, cols = (top + down, bottom + down), (left + along, right + along)
            sums.append(lane_sums(block[top - row : bottom - row, left - col : right - col], rows[0], cols[0]))
            found.append((piece, rows, cols))
    if not found:
        return []
    values = torch.stack(sums).tolist()  # one transfer from the device
    return [
        Contribution(piece.name, kind, _DTYPES[dtype], piece.shape, rows, cols, _unsigned(value))
        for (piece, rows, cols), value in zip(found, values, strict=True)
    ]


def _unsigned(value: Sequence[int]) -> Lanes:
    first, second, third, fourth = (lane % 2**64 for lane in value)
    return first, second, third, fourth


def collect(
    contributions: Sequence[Contribution],
    *,
    expected: Mapping[str, tuple[int, ...]],
    kinds: Sequence[str],
    group: Any = None,
) -> dict[tuple[str, str], TensorDigest]:
    """The digest of every logical tensor, the same on every rank; collective over `group` (one that is on the CPU).

    Every tensor of `expected` (published name -> shape) must be covered exactly once in each of `kinds`; "master"
    stands for the tensors whose weight is 16 bits wide, and may be missing for the others. Raises, on every rank
    alike: Differs where ranks that hold the same block hold different bits; ApertusError (our own fault) for a gap,
    an overlap, another dtype or shape, or a tensor that is not expected.
    """
    every: list[list[tuple[Any, ...]]] = [[astuple(item) for item in contributions]]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size(group)
        if world > 1:
            mine = every[0]
            every = [[] for _ in range(world)]
            torch.distributed.all_gather_object(every, mine, group=group)
    return merge([[Contribution(*item) for item in rank] for rank in every], expected=expected, kinds=kinds)


def merge(
    ranks: Sequence[Sequence[Contribution]], *, expected: Mapping[str, tuple[int, ...]], kinds: Sequence[str]
) -> dict[tuple[str, str], TensorDigest]:
    """What `collect` makes of the contributions of all ranks."""
    blocks: dict[tuple[str, str], dict[tuple[Range, Range], tuple[int, Contribution]]] = {
        (name, kind): {} for name in expected for kind in kinds
    }
    for rank, items in enumerate(ranks):
        for item in items:
            held = blocks.get((item.name, item.kind))
            if held is None or item.shape != tuple(expected[item.name]):
                raise ApertusError(f"rank {rank} holds {item.name} ({item.kind}) {item.shape}, which is not expected")
            first, same = held.setdefault((item.rows, item.cols), (rank, item))
            if same.lanes != item.lanes or same.dtype != item.dtype:
                raise Differs(
                    f"{item.name} ({item.kind}): ranks {first} and {rank} hold different bits of the same block, rows "
                    f"{item.rows[0]} to {item.rows[1] - 1}, columns {item.cols[0]} to {item.cols[1] - 1}: "
                    "replicas have drifted apart"
                )
    items_of = {key: [item for _, item in held.values()] for key, held in blocks.items()}
    for name in expected:  # weights of 32 bits are their own master
        weights = items_of.get((name, "weight"), [])
        if weights and weights[0].dtype == "float32" and not items_of.get((name, "master"), [weights[0]]):
            del items_of[name, "master"]
    return {(name, kind): _sum(name, kind, expected[name], items) for (name, kind), items in items_of.items()}


def _sum(name: str, kind: str, shape: tuple[int, ...], items: list[Contribution]) -> TensorDigest:
    size = _size(shape)
    rows, cols = (1, size) if len(shape) < 2 else (size // max(1, shape[-1]), shape[-1])
    what = f"{name} ({kind})"
    covered = sum((item.rows[1] - item.rows[0]) * (item.cols[1] - item.cols[0]) for item in items)
    if covered != size:
        raise ApertusError(f"{what}: {covered} of {size} elements are held by some rank")
    items = sorted(items, key=lambda item: (item.rows, item.cols))
    for index, item in enumerate(items):
        if item.dtype != items[0].dtype:
            raise ApertusError(f"{what}: held as {items[0].dtype} and as {item.dtype}")
        if item.rows[0] < 0 or item.cols[0] < 0 or item.rows[1] > rows or item.cols[1] > cols:
            raise ApertusError(f"{what}: rows {item.rows}, columns {item.cols} are outside of {shape}")
        for other in items[index + 1 :]:
            if other.rows[0] >= item.rows[1]:
                break
            if other.cols[0] < item.cols[1] and item.cols[0] < other.cols[1]:
                raise ApertusError(f"{what}: blocks {item.rows} {item.cols} and {other.rows} {other.cols} overlap")
    if not items:
        raise ApertusError(f"{what}: has no elements")
    totals = [sum(item.lanes[lane] for item in items) % 2**64 for lane in range(LANES)]
    return TensorDigest(name, kind, items[0].dtype, tuple(shape), _unsigned(totals))
