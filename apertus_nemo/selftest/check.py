"""One thing that the self-test has looked at, and what came of it.

Check("imports", OK, "torch, numpy")
exit_code(checks)      # 0, or 1 where one failed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"
_SHOWN = 10  # of many faults in a line


@dataclass(frozen=True)
class Check:
    """A name, one of OK, FAILED and NOT_CHECKED, and what was seen or why nothing was."""

    name: str
    state: str
    reason: str

    def line(self) -> str:
        """For a person."""
        return f"{self.state:11}  {printable(self.name)}: {printable(self.reason)}"

    def tree(self) -> dict[str, str]:
        """As plain data."""
        return {"name": self.name, "reason": self.reason, "state": self.state}


def exit_code(checks: Sequence[Check]) -> int:
    """1 where a check failed; what was not checked is said, and fails nothing."""
    return 1 if any(check.state == FAILED for check in checks) else 0


def verdict(name: str, faults: Sequence[str], fine: str) -> Check:
    """OK with `fine` where there are no faults; else they are listed, the first ten."""
    if not faults:
        return Check(name, OK, fine)
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return Check(name, FAILED, "; ".join(faults[:_SHOWN]) + more)


def printable(text: str) -> str:
    """`text` without what would drive a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]
