"""`trainer.max_time`: how long a start may take, as Lightning and NeMo write it: "DD:HH:MM:SS".

    time_limit_s("00:03:55:00")             # 14100
    without_time_limit(["optim.lr=1e-3", "trainer.max_time=00:03:55:00"])    # ["optim.lr=1e-3"]

It changes when a run pauses, and no number of it; a job's limit may be another one each time. So it is no part of the
lock: there it is always null, and the overrides that set it are left out. Each start notes its own, in its attempt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

KEY = "trainer.max_time"

_FORM = re.compile(r"([0-9]{2,3}):([0-9]{2}):([0-9]{2}):([0-9]{2})\Z")
_UNITS_S = (86400, 3600, 60, 1)
_LIMITS = (1000, 24, 60, 60)


def time_limit_s(text: str) -> int | None:
    """Seconds of "DD:HH:MM:SS"; None where it is none, or nothing."""
    match = _FORM.match(text)
    if match is None:
        return None
    parts = [int(part) for part in match.groups()]
    if any(part >= limit for part, limit in zip(parts, _LIMITS, strict=True)):
        return None
    return sum(part * unit for part, unit in zip(parts, _UNITS_S, strict=True)) or None


def sets_time_limit(override: str) -> bool:
    """An override, as typed, that sets, adds or removes the key; in a section as a whole it is not looked for."""
    return override.partition("=")[0].lstrip("+~").split("@")[0] == KEY


def without_time_limit(overrides: Sequence[str]) -> list[str]:
    """Overrides as a lock holds them."""
    return [override for override in overrides if not sets_time_limit(override)]
