"""The attempts of a run as a report shows them: which steps each did, how it ended, and why.

How an attempt ended is what its launcher wrote down (record/attempts.py). Where it wrote nothing, as in the first
records, the last line of a rank's traceback tells; times come from the curves in `logs/`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record import attempts as recorded
from apertus_nemo.record.canonical import loads_canonical
from apertus_nemo.record.claim import is_claimed
from apertus_nemo.record.places import AnyPath, names, open_binary, printable, read
from apertus_nemo.record.seal import SEAL, Seal
from apertus_nemo.report.throughput import Spell

_OUTPUT = re.compile(r"rank-([0-9]{1,6})\.log\Z")
_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(r"(?:[A-Za-z_][\w.]*\.)?([A-Za-z_]\w*): (.+)")
_TAIL_BYTES = 16 * 2**10
_MAX_BYTES = 16 * 2**20
_MAX_RANKS = 256  # whose output is looked at
MAX_ATTEMPTS = 200  # shown: the first and the last


def read_attempts(root: AnyPath, spells: dict[int, Spell]) -> tuple[list[dict[str, Any]], int]:
    """(attempts as plain data, how many were left out). What cannot be read is passed over: `verify` names it."""
    try:
        found = recorded.read_attempts(root, running=isinstance(root, Path) and is_claimed(root))
    except InputError:
        found = []
    shown = found if len(found) <= MAX_ATTEMPTS else found[: MAX_ATTEMPTS // 2] + found[-MAX_ATTEMPTS // 2 :]
    return [_tree(root, attempt, spells.get(attempt.number)) for attempt in shown], len(found) - len(shown)


def _tree(root: AnyPath, attempt: recorded.Attempt, spell: Spell | None) -> dict[str, Any]:
    folder = root / f"attempts/{attempt.number:03d}"
    progress, outcome, sealed = attempt.progress, attempt.outcome, _sealed_step(folder)
    firsts = [progress.first_step if progress else None, spell.first_step if spell else None]
    lasts = [progress.step if progress else None, outcome.step if outcome else None, spell.last_step if spell else None]
    last = max((step for step in (*lasts, sealed) if step is not None), default=None)
    cause, message = attempt.cause, attempt.message
    error = _error(folder) if outcome is None and cause == recorded.UNKNOWN else None
    if error is not None:
        cause, message = recorded.FAILED, error
    return {
        "began_s": None if spell is None else spell.began_s,
        "cause": cause,
        "ended_s": None if spell is None else spell.ended_s,
        "exit_code": None if outcome is None else outcome.exit_code,
        "first_step": next((step for step in firsts if step is not None), None),
        "last_step": last,
        "message": printable(message if attempt.broken is None else f"{message} ({attempt.broken})"),
        "number": attempt.number,
        "other_machine": _other_machine(root, folder),
        "sealed_step": sealed,
        "tokens_per_second": attempt.tokens_per_second,
    }


def _sealed_step(folder: AnyPath) -> int | None:
    """The step of the attempt's last checkpoint."""
    try:
        return Seal.from_bytes(read(folder / SEAL, max_bytes=_MAX_BYTES), what=SEAL).mark.last_step
    except InputError:
        return None


def _other_machine(root: AnyPath, folder: AnyPath) -> list[str]:
    """Fields in which an attempt's own observation is not that of the first."""
    found = []
    for path in (root / "observed.json", folder / "observed.json"):
        if not path.is_file():
            return []
        try:
            tree = loads_canonical(read(path, max_bytes=_MAX_BYTES), what=path.name)
        except InputError:
            return []
        found.append(tree if isinstance(tree, dict) else {})
    first, now = found
    return sorted(printable(name) for name in first.keys() | now.keys() if first.get(name) != now.get(name))


def _error(folder: AnyPath) -> str | None:
    """The last line of the traceback that a rank ended with: of the lowest rank that has one."""
    try:
        outputs = sorted((int(match[1]), name) for name in names(folder) if (match := _OUTPUT.match(name)))
    except OSError:
        return None
    for rank, name in outputs[:_MAX_RANKS]:
        try:
            with open_binary(folder / name) as stream:
                if stream.seekable():
                    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
                tail = stream.read(_TAIL_BYTES).decode(errors="replace")
        except (OSError, InputError):
            continue
        message = last_error(tail)
        if message is not None:
            return f"rank {rank}: {message}"
    return None


def last_error(text: str) -> str | None:
    """ "Kind: message" of the last traceback in a text; None where there is none."""
    _, found, after = text.rpartition(_TRACEBACK)
    if not found:
        return None
    for line in after.split("\n")[1:]:
        if line[:1].isspace() or not line:
            continue
        match = _ERROR.match(line)
        return f"{match[1]}: {match[2]}" if match is not None else line
    return None
