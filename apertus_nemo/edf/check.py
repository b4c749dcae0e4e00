"""Check EDFs: every fault that can be seen in the files, with line, reason and remedy.

report = check_file(Path("train.toml"), Settings(CE, site=None, environment=os.environ))
report.invalid, report.findings
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.edf.dialects import Dialect
from apertus_nemo.edf.document import Document, read_document
from apertus_nemo.edf.finding import ERROR, NOTE, SEVERITIES, WARNING, Fault, Finding
from apertus_nemo.edf.inherit import Lookup, load_chain, merge, search_folders
from apertus_nemo.edf.rules import Case, in_order
from apertus_nemo.edf.rules_hooks import check_hooks
from apertus_nemo.edf.rules_image import check_image
from apertus_nemo.edf.rules_keys import check_annotation_types, check_keys
from apertus_nemo.edf.rules_mounts import check_mounts
from apertus_nemo.edf.rules_variables import check_variables
from apertus_nemo.edf.sites import Site

CHECKS = (check_keys, check_annotation_types, check_image, check_mounts, check_variables, check_hooks)


@dataclass(frozen=True)
class View:
    """How files are looked at: by which engine, for which site, from which environment."""

    dialect: Dialect
    environment: Mapping[str, str] = field(repr=False, default_factory=dict)
    site: Site | None = None
    folders: Sequence[Path] | None = None  # instead of those of EDF_PATH

    def lookup(self) -> Lookup:
        """How bases are found."""
        folders = tuple(self.folders) if self.folders else search_folders(self.environment, self.dialect)
        return Lookup(self.dialect, folders, self.environment)


@dataclass(frozen=True)
class Report:
    """All findings on one file and its bases."""

    file: str
    findings: tuple[Finding, ...]

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def invalid(self) -> bool:
        return self.count(ERROR) > 0

    def summary(self) -> str:
        """One line."""
        numbers = [f"{self.count(s)} {s}{'' if self.count(s) == 1 else 's'}" for s in SEVERITIES if self.count(s)]
        return f"{self.file}: {', '.join(numbers) if numbers else 'nothing to say'}"

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        findings = [finding.tree() for finding in self.findings]
        numbers = {"errors": self.count(ERROR), "warnings": self.count(WARNING), "notes": self.count(NOTE)}
        return {"file": self.file, "findings": findings, **numbers}


def check_file(path: Path, view: View, name: str | None = None) -> Report:
    """Check one file. Never raises for what is in files: that is in the report."""
    try:
        document = read_document(path, name)
    except Fault as error:
        return Report(error.finding.file, (error.finding,))
    return check_document(document, view)


def check_document(document: Document, view: View) -> Report:
    """As `check_file`, of a document that was read."""
    lookup = view.lookup()
    chain = load_chain(document, lookup)
    case = Case(document, chain, merge(chain.links), lookup, view.site)
    findings = [*chain.faults, *(finding for check in CHECKS for finding in check(case))]
    return Report(document.name, tuple(in_order(findings, document.name)))
