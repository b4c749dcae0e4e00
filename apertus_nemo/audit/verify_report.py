"""A verification in words, and as JSON."""

from __future__ import annotations

from typing import Any

from apertus_nemo.audit.chain import MAX_FINDINGS
from apertus_nemo.audit.verification import Verification

FORMAT = 1  # of the JSON
_MAX_LISTED = 20


def text(result: Verification) -> str:
    """Lines for people: the verdict, what was found and where, what it rests on, what was not checked."""
    lines = [_headline(result)]
    lines += [f"  {finding.place}: {finding.what}" for finding in result.findings[1:_MAX_LISTED]]
    if len(result.findings) > _MAX_LISTED:
        more = len(result.findings) - _MAX_LISTED
        lines.append(f"  and {more}{' or more' if len(result.findings) >= MAX_FINDINGS else ''} further places")
    if result.lock_digest:
        lines.append(f"  lock digest sha256:{result.lock_digest}")
    if result.record_digest:
        lines.append(f"  record digest sha256:{result.record_digest}")
    lines.append(f"  checked: {_checked(result)}")
    lines += [f"  note: {note}" for note in result.notes]
    lines += [f"  not checked: {item}" for item in result.not_checked]
    return "\n".join(lines)


def _headline(result: Verification) -> str:
    if result.findings:
        return f"changed: {result.findings[0].place}: {result.findings[0].what}"
    if result.finished:
        return f"whole: finished at step {result.last_step}"
    return f"whole so far: unfinished, at step {result.last_step or 0}"


def _checked(result: Verification) -> str:
    checkpoints = f"{len(result.checkpoints)} checkpoint{'' if len(result.checkpoints) == 1 else 's'}"
    return (
        f"{result.lines:,} lines of the step log, {result.states} states, {checkpoints}, "
        f"{result.files:,} files with {result.size_bytes:,} bytes"
    )


def tree(result: Verification) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "checkpoints": result.checkpoints,
        "exit_code": result.exit_code,
        "files": result.files,
        "findings": [{"file": f.file, "line": f.line, "step": f.step, "what": f.what} for f in result.findings],
        "finished": result.finished,
        "format": FORMAT,
        "last_step": result.last_step,
        "lines": result.lines,
        "lock_digest": result.lock_digest,
        "not_checked": result.not_checked,
        "notes": result.notes,
        "planned_steps": result.planned_steps,
        "pruned": result.pruned,
        "record": result.record,
        "record_digest": result.record_digest,
        "removed": result.removed,
        "sealed_step": result.sealed_step,
        "size_bytes": result.size_bytes,
        "states": result.states,
        "verdict": "changed" if result.findings else "whole" if result.finished else "whole so far",
    }
