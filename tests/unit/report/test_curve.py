"""Curves: exact while short; then every extreme is kept, whatever the order in which values come."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apertus_nemo.report.curve import Curve


def test_a_short_curve_is_exact() -> None:
    curve = Curve(max_points=10)
    curve.extend([1, 2, 3], [3.0, 1.0, 2.0])
    curve.extend([7], [5.0])
    assert curve.points() == ([1, 2, 3, 7], [3.0, 1.0, 2.0, 5.0])
    assert (curve.stretch, curve.count, curve.first, curve.last) == (1, 4, (1, 3.0), (7, 5.0))
    assert (curve.smallest, curve.largest) == ((2, 1.0), (7, 5.0))


def test_an_empty_curve() -> None:
    curve = Curve()
    curve.extend([], [])
    assert curve.points() == ([], [])
    assert (curve.first, curve.last, curve.smallest, curve.largest) == (None, None, None, None)


def test_a_spike_of_one_step_in_a_million_is_kept_and_the_size_is_bounded() -> None:
    curve = Curve(max_points=2000)
    for begin in range(1, 1_000_001, 8000):
        steps = range(begin, min(begin + 8000, 1_000_001))
        curve.extend(steps, [99.0 if step == 777_777 else -7.0 if step == 123_456 else 1.0 for step in steps])
    steps, values = curve.points()
    assert len(steps) <= 2000
    assert (steps[0], steps[-1]) == (1, 1_000_000)
    assert dict(zip(steps, values, strict=True))[777_777] == 99.0
    assert dict(zip(steps, values, strict=True))[123_456] == -7.0
    assert steps == sorted(set(steps))
    assert curve.stretch == 1024


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300),
    st.integers(4, 40),
    st.integers(1, 50),
    st.integers(1, 10**9),
)
def test_each_stretch_keeps_its_own_extremes(values: list[float], max_points: int, block: int, first: int) -> None:
    """Against a direct computation over all values."""
    curve = Curve(max_points=max_points)
    steps = list(range(first, first + len(values)))
    for begin in range(0, len(values), block):
        curve.extend(steps[begin : begin + block], values[begin : begin + block])
    kept = dict(zip(*curve.points(), strict=True))
    assert len(kept) <= max_points
    assert all(values[step - first] == value for step, value in kept.items())  # nothing is invented
    assert {steps[0], steps[-1]} <= set(kept)
    for begin in range(0, len(values), curve.stretch):
        part = values[begin : begin + curve.stretch]
        inside = [kept[step] for step in steps[begin : begin + curve.stretch] if step in kept]
        assert (min(inside), max(inside)) == (min(part), max(part))
    assert curve.smallest is not None
    assert curve.largest is not None
    assert (curve.smallest[1], curve.largest[1]) == (min(values), max(values))


def test_gaps_of_any_width() -> None:
    """Throughput of a run whose first part was not recorded."""
    steps = sorted(random.Random(1).sample(range(1, 10**12), 5000))
    curve = Curve(max_points=100)
    curve.extend(steps, [float(step % 97) for step in steps])
    assert len(curve.points()[0]) <= 100
    assert curve.points()[0][-1] == steps[-1]


@pytest.mark.parametrize("block", [1, 3])
def test_values_that_are_not_finite_are_counted(block: int) -> None:
    values = [1.0, math.nan, math.inf, 2.0, -math.inf]
    curve = Curve()
    for begin in range(0, 5, block):
        curve.extend(range(begin + 1, min(begin + block, 5) + 1), values[begin : begin + block])
    assert curve.points() == ([1, 4], [1.0, 2.0])
    assert (curve.not_finite, curve.not_finite_steps) == (3, [2, 3, 5])
