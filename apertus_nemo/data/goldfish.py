"""The Goldfish mask: about one label in k is left out of the loss, chosen by a hash of its context.

Goldfish loss: arXiv 2406.10209, with the table and the rule of the Apertus runs (arXiv 2509.14233,
Algorithm 1 and appendix F). For label i of a sample, with h labels of context,

    key(i) = (labels[i - h + 1] * ... * labels[i], wrapped to int64) modulo 1,000,003, never negative
    label i is dropped when table[key(i)] < 1/k

The first h - 1 labels are never dropped. Windows cross document borders. The table is
`torch.rand(1_000_003)` of a CPU generator seeded 2971215073.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from apertus_nemo.errors import UnfitEnvironment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TABLE_SIZE = 1_000_003  # entries; prime
TABLE_SEED = 2_971_215_073
TABLE_SHA256 = "33025be4fa64d02d0a2e630dfa7fc166bf76a5364206fe4cd8973ce46e836562"  # of the float32 little-endian


@lru_cache(maxsize=1)
def table() -> NDArray[np.float32]:
    """The table: float32, shape [1_000_003], values in [0, 1), read-only.

    Raises:
        UnfitEnvironment: this torch draws other numbers than those of the published runs.
    """
    import torch

    generator = torch.Generator(device="cpu").manual_seed(TABLE_SEED)
    values: NDArray[np.float32] = torch.rand(TABLE_SIZE, generator=generator, device="cpu", dtype=torch.float32).numpy()
    actual = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
    if actual != TABLE_SHA256:
        raise UnfitEnvironment(
            f"torch {torch.__version__} draws another Goldfish table (SHA-256 {actual}, not {TABLE_SHA256}): "
            "use the locked version, or data.goldfish=false"
        )
    values.flags.writeable = False
    return values


def keys(labels: NDArray[Any], *, h: int) -> NDArray[np.int64]:
    """Rows of the table for the labels h-1, h, ...: int64, shape [..., n - h + 1], or [..., 0] when n < h.

    The product of a window is one modulo 2^64, so windows of length h are put together from
    windows of lengths 1, 2, 4, ... in any order; unsigned arithmetic wraps by definition.
    """
    import numpy as np

    count = labels.shape[-1] - h + 1
    if count <= 0:
        return np.empty((*labels.shape[:-1], 0), dtype=np.int64)
    power = labels.astype(np.int64).view(np.uint64)  # power[i] = labels[i] * ... * labels[i + length - 1]
    product = np.ones((*labels.shape[:-1], count), dtype=np.uint64)
    length, covered = 1, 0
    while True:
        if h & length:
            product *= power[..., covered : covered + count]
            covered += length
        if covered == h:
            return np.remainder(product.view(np.int64), np.int64(TABLE_SIZE))
        power = power[..., :-length] * power[..., length:]
        length *= 2


def kept(labels: NDArray[Any], *, k: int, h: int) -> NDArray[np.float32]:
    """The mask of the labels: 1.0 where the loss counts, 0.0 where the label is dropped.

    Args:
        labels: integers, shape [..., n]; each row is one sample.
        k: 1/k of the labels is dropped.
        h: labels that the hash sees, the dropped one included.

    Returns:
        float32 of the labels' shape.
    """
    import numpy as np

    mask = np.ones(labels.shape, dtype=np.float32)
    dropped = table()[keys(labels, h=h)] < np.float32(1.0 / k)
    mask[..., h - 1 :][dropped] = 0.0
    return mask
