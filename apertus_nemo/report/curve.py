"""A curve of any length in bounded memory: exact while it is short, else the extremes of equal stretches.

    curve = Curve(max_points=2000)
    curve.extend([1, 2, 3], [5.2, 5.1, 5.0])
    curve.stretch                     # 1: every value is kept; n: the smallest and the largest of every n steps
    curve.points()                    # ([1, 2, 3], [5.2, 5.1, 5.0])

A spike of a single step is an extreme of its stretch, so it is never lost; nor are the first and the last value.
Values that are not finite are counted, and are no points.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

MAX_POINTS = 2000  # of a curve in a report
_LISTED = 5  # steps of values that are not finite

_Point = tuple[int, float]


class Curve:
    """Takes values by ascending step and keeps at most `max_points` of them."""

    def __init__(self, *, max_points: int = MAX_POINTS) -> None:
        self._max_buckets = max(1, (max_points - 2) // 2)
        self._max_points = max_points
        self._exact: list[_Point] | None = []  # all of them, while they fit
        self._buckets: dict[int, tuple[_Point, _Point]] = {}  # step // stretch -> (smallest, largest)
        self.stretch = 1  # steps that share a smallest and a largest value
        self.count = 0  # of finite values
        self.first: _Point | None = None
        self.last: _Point | None = None
        self.smallest: _Point | None = None
        self.largest: _Point | None = None
        self.not_finite = 0
        self.not_finite_steps: list[int] = []  # the first few

    def extend(self, steps: Sequence[int], values: Sequence[float]) -> None:
        """Add values of steps that ascend, and are later than those before."""
        if not all(map(math.isfinite, values)):
            pairs = []
            for step, value in zip(steps, values, strict=True):
                if math.isfinite(value):
                    pairs.append((step, value))
                    continue
                self.not_finite += 1
                if len(self.not_finite_steps) < _LISTED:
                    self.not_finite_steps.append(step)
            steps, values = [step for step, _ in pairs], [value for _, value in pairs]
        if not steps:
            return
        self.count += len(steps)
        self.first = self.first or (steps[0], values[0])
        self.last = (steps[-1], values[-1])
        if self._exact is not None:
            self._exact += zip(steps, values, strict=True)
            if len(self._exact) <= self._max_points:
                self._note(*_extremes(steps, values))
                return
            steps, values = [step for step, _ in self._exact], [value for _, value in self._exact]
            self._exact = None
        while (steps[-1] - self.first[0]) // self.stretch >= self._max_buckets:
            self._double()
        self._into_buckets(steps, values)

    def _into_buckets(self, steps: Sequence[int], values: Sequence[float]) -> None:
        assert self.first is not None
        begin, origin = 0, self.first[0]
        while begin < len(steps):
            number = (steps[begin] - origin) // self.stretch
            end = bisect_left(steps, origin + (number + 1) * self.stretch, begin)
            low, high = _extremes(steps[begin:end], values[begin:end])
            self._note(low, high)
            self._merge(number, low, high)
            begin = end

    def _merge(self, number: int, low: _Point, high: _Point) -> None:
        held = self._buckets.get(number)
        if held is not None:
            low = low if low[1] < held[0][1] else held[0]
            high = high if high[1] > held[1][1] else held[1]
        self._buckets[number] = (low, high)

    def _double(self) -> None:
        held, self._buckets = self._buckets, {}
        self.stretch *= 2
        for number, (low, high) in held.items():
            self._merge(number // 2, low, high)

    def _note(self, low: _Point, high: _Point) -> None:
        if self.smallest is None or low[1] < self.smallest[1]:
            self.smallest = low
        if self.largest is None or high[1] > self.largest[1]:
            self.largest = high

    def points(self) -> tuple[list[int], list[float]]:
        """(steps, values) that are kept, by step."""
        if self._exact is not None:
            kept = self._exact
        else:
            ends = [point for point in (self.first, self.last) if point is not None]
            kept = sorted({*ends, *(point for pair in self._buckets.values() for point in pair)})
        return [step for step, _ in kept], [value for _, value in kept]


def _extremes(steps: Sequence[int], values: Sequence[float]) -> tuple[_Point, _Point]:
    """The first smallest and the first largest of finite values."""
    low, high = values.index(min(values)), values.index(max(values))
    return (steps[low], values[low]), (steps[high], values[high])
