"""Initial weights: the documented stream, a sound normal distribution, and slices that are slices of the whole."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from apertus_nemo.errors import ApertusError
from apertus_nemo.model import init
from apertus_nemo.model.init import initial_values, xielu_raw
from apertus_nemo.recipe.schema import ModelConfig

MODEL = ModelConfig(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=256,
)
FROZEN = "7d46532657853566642789ce71b2e8843f9da9eed9ed022582a632141f3bf175"  # of 512 x 300 values
NAME = "model.layers.0.mlp.up_proj.weight"


def _values(
    name: str,
    shape: tuple[int, int],
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    **kw: int,
) -> np.ndarray:
    return initial_values(
        name, shape, rows or (0, shape[0]), cols or (0, shape[1]), seed=kw.get("seed", 28), model=MODEL
    )


def _philox(key: int, counter: int) -> list[int]:
    """Philox 4x64-10 as its paper writes it (Salmon et al., SC 2011)."""
    mask = (1 << 64) - 1
    c = [(counter >> (64 * i)) & mask for i in range(4)]
    k = [key & mask, key >> 64]
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(right >> 64) ^ c[1] ^ k[0], right & mask, (left >> 64) ^ c[3] ^ k[1], left & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_values_are_what_the_specification_says() -> None:
    """From the paper's generator and Python's own normal quantiles: neither numpy's Philox nor our polynomials."""
    shape = (3, 7)
    key = int.from_bytes(
        hashlib.sha256(b"apertus-nemo initialisation 1\x0028\x00" + NAME.encode()).digest()[:16], "little"
    )
    words = [word for counter in range(1, 7) for word in _philox(key, counter)]
    normal = statistics.NormalDist(sigma=MODEL.init_method_std)
    expected = [normal.inv_cdf(((word >> 11) + 0.5) / 2**53) for word in words[:21]]
    np.testing.assert_allclose(_values(NAME, shape).reshape(-1), expected, rtol=3e-7)


def test_bits_are_frozen() -> None:
    """A change here makes every recorded run another run."""
    assert hashlib.sha256(_values(NAME, (512, 300)).astype("<f4").tobytes()).hexdigest() == FROZEN


def test_bits_do_not_depend_on_the_instruction_set() -> None:
    code = (
        "import hashlib; from tests.unit.model import test_init as t;"
        "print(hashlib.sha256(t._values(t.NAME, (512, 300)).astype('<f4').tobytes()).hexdigest())"
    )
    plain = {**os.environ, "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=plain,
                          cwd=Path(__file__).parents[3], timeout=60, check=True)  # fmt: skip
    assert done.stdout.strip() == FROZEN


@settings(max_examples=60, deadline=None)
@given(data=st.data(), columns=st.sampled_from([1, 5, 64, 4096, 4097, 5000]))
def test_a_slice_is_the_slice_of_the_whole(data: st.DataObject, columns: int) -> None:
    shape = (6, columns)
    first, stop = sorted((data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))))
    left, right = sorted((data.draw(st.integers(0, columns)), data.draw(st.integers(0, columns))))
    whole = _values(NAME, shape)
    np.testing.assert_array_equal(_values(NAME, shape, (first, stop), (left, right)), whole[first:stop, left:right])


def test_blocks_do_not_show() -> None:
    """Rows longer than a block, and more rows than fit one."""
    wide = _values(NAME, (2, 40_000))
    np.testing.assert_array_equal(_values(NAME, (2, 40_000), (1, 2), (16_000, 33_000)), wide[1:2, 16_000:33_000])
    tall = _values(NAME, (30_000, 2))
    np.testing.assert_array_equal(_values(NAME, (30_000, 2), (20_001, 20_004)), tall[20_001:20_004])


def test_the_distribution_is_normal() -> None:
    sample = _values("lm_head.weight", (2048, 1024)).astype(np.float64).ravel() / MODEL.init_method_std
    n = sample.size
    # each statistic's own standard deviation is 1; 4.5 of them happen once in 150,000 seeds
    assert abs(sample.mean()) * math.sqrt(n) < 4.5
    assert abs(sample.var() - 1.0) * math.sqrt(n / 2) < 4.5
    assert abs(stats.skew(sample)) * math.sqrt(n / 6) < 4.5
    assert abs(stats.kurtosis(sample)) * math.sqrt(n / 24) < 4.5
    assert stats.kstest(sample, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) * math.sqrt(n) < 4.5
    for threshold in (2.0, 3.0, 4.0):
        expected = n * 2 * stats.norm.sf(threshold)
        assert abs((np.abs(sample) > threshold).sum() - expected) < 4.5 * math.sqrt(expected)


def test_quantiles_to_the_ends() -> None:
    """The transform itself, over all magnitudes of a word and the last bits at both ends."""
    some = {value for i in range(64) for value in (1 << i, (1 << i) - 1)}
    words = np.array(sorted(some | {(1 << 64) - 1 - value for value in some}), np.uint64)
    k = (words >> np.uint64(11)).astype(np.int64)
    low, high = ((x.astype(np.float64) + 0.5) * 2.0**-53 for x in (k, (1 << 53) - 1 - k))  # p and 1 - p
    expected = np.where(low < high, special.ndtri(low), -special.ndtri(high))
    got = init._deviates(words)
    np.testing.assert_allclose(got, expected, rtol=2e-7)
    np.testing.assert_array_equal(got, -got[::-1])  # odd in p - 1/2
    assert (np.diff(got) >= 0).all()


def test_names_and_seeds_give_other_streams() -> None:
    one = _values(NAME, (16, 64))
    for other in (_values("model.layers.1.mlp.up_proj.weight", (16, 64)), _values(NAME, (16, 64), seed=29)):
        assert (one != other).mean() > 0.99
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.embed_tokens.weight", 0.008944),
        ("model.layers.2.self_attn.q_proj.weight", 0.008944),
        ("model.layers.2.self_attn.o_proj.weight", 0.008944 / 4),  # sqrt(2 * 8 layers) = 4
        ("model.layers.2.mlp.down_proj.weight", 0.008944 / 4),
        ("lm_head.weight", 0.008944),
    ],
)
def test_deviations(name: str, std: float) -> None:
    assert _values(name, (128, 512)).std() == pytest.approx(std, rel=0.02)


def test_norms_are_ones_and_scalars_are_the_published_ones() -> None:
    for name in (
        "model.norm.weight",
        "model.layers.0.attention_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ):
        values = initial_values(name, (64,), (0, 1), (8, 24), seed=1, model=MODEL)
        assert values.shape == (1, 16)
        assert (values == 1.0).all()
    names = ["model.layers.3.mlp.act_fn.alpha_p", "model.layers.3.mlp.act_fn.alpha_n"]
    for precision, expected in {"fp32": [0.2033823, -1.0502256], "bf16": [0.2109375, -1.046875]}.items():
        got = [initial_values(n, (1,), (0, 1), (0, 1), seed=1, model=MODEL, precision=precision).item() for n in names]
        assert got == pytest.approx(expected, abs=5e-8)
    assert xielu_raw(MODEL, "bf16") == (0.2109375, -1.046875)


def test_an_unknown_vector_is_our_own_fault() -> None:
    with pytest.raises(ApertusError, match=r"no initialisation is known for 'model.bias' of shape \(8,\)"):
        initial_values("model.bias", (8,), (0, 1), (0, 8), seed=1, model=MODEL)
