"""The table of `apertus-nemo runs`: one line a run, as wide as the terminal, and no character that drives it."""

from __future__ import annotations

from collections.abc import Sequence

from apertus_nemo.audit.status import BROKEN, RunStatus
from apertus_nemo.record.places import printable

_HEAD = ("RUN", "STATE", "STAGE", "STEP", "TOKENS", "LOSS", "TOKENS/S", "ATTEMPTS", "LAST FAILURE")
_RIGHT = frozenset({"STAGE", "STEP", "TOKENS", "LOSS", "TOKENS/S", "ATTEMPTS"})
_NONE = "-"


def table(statuses: Sequence[RunStatus], *, width: int | None = None) -> str:
    """The lines, cut to `width` columns where one is given (a terminal's)."""
    rows = [_HEAD, *map(_cells, statuses)]
    sizes = [max(len(row[column]) for row in rows) for column in range(len(_HEAD) - 1)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(size) if name in _RIGHT else cell.ljust(size)
            for name, cell, size in zip(_HEAD, row, sizes, strict=False)
        ]
        line = "  ".join([*cells, row[-1]]).rstrip()
        lines.append(line if width is None or len(line) <= width else line[: max(0, width - 1)] + "…")
    return "\n".join(lines)


def _cells(status: RunStatus) -> tuple[str, ...]:
    last = status.last_failure or ""
    if status.state == BROKEN or status.broken is not None:
        last = f"cannot be read: {status.broken}"
    return (
        printable(status.run),
        status.state if status.phase is None or status.step else f"{status.state} ({printable(status.phase)})",
        _NONE if status.stage is None else printable(status.stage_name or f"{status.stage}/{status.stages}"),
        f"{_count(status.step)}/{_count(status.steps)}" if status.steps is not None else _count(status.step),
        _tokens(status.tokens),
        _NONE if status.loss is None else f"{status.loss:.4f}",
        _NONE if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
        str(status.attempts),
        printable(last),
    )


def _count(value: int | None) -> str:
    return _NONE if value is None else str(value)


def _tokens(value: int | None) -> str:
    """Three digits and a unit: 163,840 is 164k."""
    if value is None:
        return _NONE
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.3g}{unit}"
    return str(value)
