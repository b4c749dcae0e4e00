"""Holding what was observed on the machines now against the first attempt, by a table.

    findings = compare_observed(first, now, level="bitwise", instruction_set="native")
    [finding for finding in findings if finding.refused]

A field that the table does not know must be equal: what is added later is refused until somebody has thought about it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.record.canonical import dumps

EQUAL = "must be equal"
EQUAL_IF_NATIVE = "may differ where the instruction set is pinned"
EQUAL_IF_BITWISE = "may differ at level relaxed"
RECORDED = "recorded only"


@dataclass(frozen=True)
class Rule:
    """When a field may differ, and why."""

    kind: str
    reason: str


TABLE: dict[str, Rule] = {
    "architecture": Rule(EQUAL, "other processors round other sums"),
    "cpu_capability": Rule(EQUAL, "torch chooses its kernels by it"),
    "cpu_features": Rule(EQUAL_IF_NATIVE, "MKL, oneDNN and the C library choose their kernels by them"),
    "cpu_model": Rule(EQUAL_IF_NATIVE, "MKL and oneDNN choose kernels and block sizes by it"),
    "deterministic_algorithms": Rule(EQUAL, "torch's other kernels sum in any order"),
    "driver": Rule(EQUAL_IF_BITWISE, "it compiles kernels for the GPU"),
    "gpu": Rule(EQUAL_IF_BITWISE, "kernels and block sizes are chosen by it"),
    "host": Rule(RECORDED, "a name"),
    "kernel": Rule(RECORDED, "it does no arithmetic"),
    "libc": Rule(EQUAL, "exp, log and their like are functions of the C library"),
    "mkl": Rule(EQUAL, "matrix products come from it"),
    "mkl_cbwr": Rule(EQUAL, "MKL's code path"),
    "process_group_backend": Rule(EQUAL, "the order of sums over ranks"),
    "python": Rule(EQUAL, "order and text of everything"),
    "threads_between_operations": Rule(EQUAL, "how work is cut into sums"),
    "threads_per_rank": Rule(EQUAL, "how work is cut into sums"),
    "torch": Rule(EQUAL, "the arithmetic itself"),
    "version": Rule(EQUAL, "the form of the observation"),
    "world_size": Rule(EQUAL, "how work is cut over ranks"),
}

_UNKNOWN_FIELD = Rule(EQUAL, "this version knows no reason why it might differ")


@dataclass(frozen=True)
class Finding:
    """A field that is not what it was; None stands for a field that is absent."""

    field: str
    first: Any
    now: Any
    refused: bool
    reason: str

    def line(self) -> str:
        """For people."""
        verdict = "must be equal" if self.refused else "may differ"
        return f"observed.{self.field}: first {_text(self.first)}, now {_text(self.now)}; {verdict}: {self.reason}"


def _text(value: Any) -> str:
    return "absent" if value is None else dumps(value).decode()


def compare_observed(
    first: Mapping[str, Any], now: Mapping[str, Any], *, level: str, instruction_set: str
) -> list[Finding]:
    """Every field that differs, sorted by name; `level` and `instruction_set` as in the recipe."""
    findings = []
    for name in sorted(first.keys() | now.keys()):
        one, other = first.get(name), now.get(name)
        if name in first and name in now and dumps(one) == dumps(other):
            continue
        rule = TABLE.get(name, _UNKNOWN_FIELD)
        may_differ = (
            rule.kind == RECORDED
            or (rule.kind == EQUAL_IF_NATIVE and instruction_set != "native")
            or (rule.kind == EQUAL_IF_BITWISE and level != "bitwise")
        )
        findings.append(Finding(name, one, other, not may_differ, rule.reason))
    return findings


def refuse_other_machine(
    first: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    level: str,
    instruction_set: str,
    allowed: Collection[str] = (),
) -> None:
    """Raise UnfitEnvironment, a line a field, where a field differs that may not; `allowed` names "observed.FIELD"."""
    findings = compare_observed(first, now, level=level, instruction_set=instruction_set)
    lines = [
        finding.line()
        for finding in findings
        if finding.refused and not {"observed", f"observed.{finding.field}"} & set(allowed)
    ]
    if lines:
        raise UnfitEnvironment("\n".join(["this machine is not as the run found it:", *lines]))
