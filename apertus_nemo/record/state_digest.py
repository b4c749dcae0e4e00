"""The lanes of a tensor, in numpy: the reference for docs/state-digest.md. Plain, not fast.

lanes(bits(array))                          # a whole tensor
lanes(bits(array)[2:4], row0=2)             # a block; blocks of one tensor add up, modulo 2^64
tensor_digest("lm_head.weight", "weight", array)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from apertus_nemo.errors import ApertusError
from apertus_nemo.record.state import LANES, Lanes, TensorDigest

Words = npt.NDArray[np.uint64]

# splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014;
# the constants are those of Vigna's https://prng.di.unimi.it/splitmix64.c (public domain).
GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def splitmix64(seed: int, start: int, stop: int) -> Words:
    """Outputs number `start` to `stop` - 1 (from 0) of the generator splitmix64 seeded with `seed`."""
    index = np.arange(start, stop, dtype=np.uint64)
    z = np.uint64(seed) + (index + np.uint64(1)) * np.uint64(GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def stream_seed(lane: int, axis: int) -> int:
    """Seed of the weights of a lane along an axis (0: rows, 1: columns)."""
    number = 2 * lane + axis
    return int(splitmix64(0, number, number + 1)[0])


def weights(lane: int, axis: int, start: int, stop: int) -> Words:
    """The odd 64-bit weights of the rows (axis 0) or columns (axis 1) `start` to `stop` - 1."""
    return splitmix64(stream_seed(lane, axis), start, stop) | np.uint64(1)


def as_matrix(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The tensor as rows and columns: 0-D and 1-D are one row; further leading dimensions count as rows."""
    return array.reshape(1, -1) if array.ndim < 2 else array.reshape(-1, array.shape[-1])


def bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The matrix of element bits, uint32 or uint16, of a float32 or float16 array.

    uint16 and uint32 pass as they are: bits of bfloat16, which numpy does not have, come so.
    """
    matrix = as_matrix(np.ascontiguousarray(array))
    if matrix.dtype in (np.dtype(np.uint32), np.dtype(np.uint16)):
        return matrix
    if matrix.dtype == np.dtype(np.float32):
        return matrix.view(np.uint32)
    if matrix.dtype == np.dtype(np.float16):
        return matrix.view(np.uint16)
    raise ApertusError(f"the state digest has no element of dtype {matrix.dtype}: float32, bfloat16 and float16 only")


def lanes(block: npt.NDArray[Any], row0: int = 0, col0: int = 0) -> Lanes:
    """The four lanes of a block of bits (rows x columns) whose first element is at (row0, col0) of its tensor."""
    rows, cols = block.shape
    words = block.astype(np.uint64)
    total = []
    for lane in range(LANES):
        a = weights(lane, 0, row0, row0 + rows)
        b = weights(lane, 1, col0, col0 + cols)
        total.append(int((words * (a[:, None] * b[None, :])).sum(dtype=np.uint64)))
    return total[0], total[1], total[2], total[3]


def tensor_digest(name: str, kind: str, array: npt.NDArray[Any], *, dtype: str | None = None) -> TensorDigest:
    """The digest of a whole tensor; for bits of bfloat16 in uint16 say dtype="bfloat16"."""
    return TensorDigest(name, kind, dtype or str(array.dtype), tuple(array.shape), lanes(bits(array)))
