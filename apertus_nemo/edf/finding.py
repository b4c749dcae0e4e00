"""What is wrong with an EDF, or will be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from apertus_nemo.errors import InputError

ERROR = "error"  # the engine refuses the file, or what stands there cannot have the effect that it names
WARNING = "warning"  # the engine takes it; the run will be slow, wrong, or another one next month
NOTE = "note"  # nothing is wrong here; something would be on another engine, or has to be known
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Finding:
    """One fault, where it stands, why it is one, and what to do."""

    severity: str
    rule: str  # `apertus-nemo edf explain RULE` prints its reason and source
    file: str
    line: int | None
    what: str
    why: str
    do: str

    def text(self) -> str:
        """Three lines, for a terminal."""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.severity}: {self.what} [{self.rule}]\n    why: {self.why}\n    do:  {self.do}"

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Fault(InputError):
    """An EDF that cannot be read any further; the message is the finding on one line."""

    def __init__(self, finding: Finding) -> None:
        place = finding.file if finding.line is None else f"{finding.file}:{finding.line}"
        super().__init__(f"{place}: {finding.what}: {finding.why}; {finding.do}")
        self.finding = finding


def printable(text: str) -> str:
    """A line of somebody's file as it may be printed: nothing of it drives the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: object, limit: int = 120) -> str:
    """A value for a message: printable, and not too long."""
    shown = printable(str(text))
    return shown if len(shown) <= limit else shown[:limit] + " ..."
