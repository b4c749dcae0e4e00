"""What a check found: what, and exactly where."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was written."""

    file: str  # name in the record
    what: str
    line: int | None = None  # from 1, in that file
    step: int | None = None  # of the step log

    @property
    def place(self) -> str:
        """File, line and step."""
        line = "" if self.line is None else f" line {self.line}"
        return self.file + line + ("" if self.step is None else f" (step {self.step})")
