"""What every benchmark ends with: its figures with their spread, each against its goal.

    figures = [Figure.of("verify over raw hashing", ratios, unit="x", at_most=1.5)]
    return finish(figures, as_json=options.json)

A script prints a table, or with `--json` one JSON list for `scripts/bench`, and exits with 1 where a goal is missed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_DIGITS = {"x": 3, "s": 3, "ms": 1, "%": 2}


@dataclass(frozen=True)
class Figure:
    """One thing that was measured several times."""

    what: str  # as a reader of the table understands it
    unit: str  # "x" (a ratio taken within one run), "s", "ms", "%", or a noun for counts
    middle: float  # median
    low: float  # first quartile
    high: float  # third quartile
    count: int  # measurements
    at_most: float | None = None  # goal for the median; None: there is none
    at_least: float | None = None

    @classmethod
    def of(
        cls,
        what: str,
        values: Sequence[float],
        *,
        unit: str,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Figure:
        """Median and quartiles of the measurements; one measurement is its own spread."""
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        return cls(what, unit, middle, low, high, len(values), at_most, at_least)

    @property
    def goal(self) -> str:
        """The goal as a person reads it; empty without one."""
        if self.at_most is not None:
            return f"at most {self.at_most:g} {self.unit}"
        return "" if self.at_least is None else f"at least {self.at_least:g} {self.unit}"

    @property
    def met(self) -> bool:
        """Whether the median reaches its goal; true without one."""
        return (self.at_most is None or self.middle <= self.at_most) and (
            self.at_least is None or self.middle >= self.at_least
        )

    def cells(self) -> list[str]:
        """What, median, quartiles, number of measurements, goal, verdict."""
        digits = _DIGITS.get(self.unit, 0)
        spread = "" if self.count == 1 else f"{self.low:.{digits}f} to {self.high:.{digits}f}"
        verdict = "" if not self.goal else "met" if self.met else "MISSED"
        return [self.what, f"{self.middle:,.{digits}f} {self.unit}", spread, str(self.count), self.goal, verdict]


HEADINGS = ["what", "median", "quartiles", "n", "goal", ""]


def table(figures: Sequence[Figure]) -> str:
    """The figures as a Markdown table whose columns line up."""
    rows = [HEADINGS, *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def finish(figures: Sequence[Figure], *, as_json: bool) -> int:
    """Print the figures; the exit code: 1 where a goal is missed."""
    if as_json:
        print(json.dumps([dataclasses.asdict(figure) for figure in figures], indent=2))
    else:
        print(table(figures))
    missed = [figure.what for figure in figures if not figure.met]
    for what in missed:
        print(f"goal missed: {what}", file=sys.stderr)
    return 1 if missed else 0
