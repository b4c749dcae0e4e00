"""What is cheap to hold of a link between two runs: digests that both records hold. No weights are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import sha256_hex
from apertus_nemo.record.checkpoints import MANIFEST, MAX_MANIFEST_BYTES, manifest_of
from apertus_nemo.record.places import names, open_binary, read
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.state import StateDigest
from apertus_nemo.record.step_line import MAX_LINE_BYTES, StepLogHeader, parse_line

EQUAL, DIFFERENT, NOT_CHECKED = "equal", "different", "not checked"

_MAX_STATE_BYTES = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was held against another."""

    what: str
    result: str  # EQUAL, DIFFERENT or NOT_CHECKED
    reason: str = ""  # unless EQUAL


@dataclass(frozen=True)
class Origin:
    """What a run, or an exported folder, says of the weights it has: which run's, after which step."""

    lock_digest: str
    step: int
    weights_digest: str | None
    not_known: str  # why the weights digest is None
    files: Any  # {file: SHA-256} of the checkpoint, SHA-256 of its manifest, or None
    merged: bool = False  # of the run's adapters and other weights
    adapter_digest: str | None = None  # of the adapters, where they were merged or exported


def of_parent(run: Path, origin: Origin) -> list[Check]:
    """The lock digest of a run that has it; the weights after the step; the files of the checkpoint."""
    kind = "adapters" if origin.merged else "weights"
    weights = _weights(
        run, origin.step, origin, f"{kind} after step {origin.step}", f"what {run} logged", origin.merged
    )
    return [Check("lock digest", EQUAL), weights, _files(run, origin)]


def first_state(run: Path, origin: Origin, *, widened: bool) -> Check:
    """What the run began with, against what its lock says that it read."""
    what = "weights that it began with"
    if widened:
        return Check(what, NOT_CHECKED, "they were widened to another precision, and so have another digest")
    return _weights(run, 0, origin, what, f"the first state of {run}")


def _weights(run: Path, step: int, origin: Origin, what: str, whose: str, adapters: bool = False) -> Check:
    pinned = origin.adapter_digest if adapters else origin.weights_digest
    if pinned is None:
        return Check(what, NOT_CHECKED, f"their digest is unknown: {origin.not_known}")
    path = RunDirectory(run).state(step)
    if not os.path.isfile(path):
        return Check(what, NOT_CHECKED, f"{run} holds no state of step {step}")
    try:
        state = StateDigest.from_bytes(read(path, max_bytes=_MAX_STATE_BYTES), what=str(path))
        logged = logged_state(run, step)
    except InputError as error:
        return Check(what, DIFFERENT, str(error))
    if state.step != step or logged not in (None, state.digest):
        return Check(what, DIFFERENT, f"{path} is not the state that the step log of {run} names")
    found = state.adapter_digest if adapters else state.digest_of_kind("weight")
    if found != pinned:
        return Check(what, DIFFERENT, f"{whose} has the digest {found}, and {pinned} was pinned")
    if logged is None:
        return Check(what, NOT_CHECKED, f"{path} has their digest, and no step log says that it is as it was")
    return Check(what, EQUAL)


def _files(run: Path, origin: Origin) -> Check:
    """A relaunch has the lock of its original, and other files with the same weights: no contradiction."""
    what = "files of the checkpoint"
    if origin.files is None:
        return Check(what, NOT_CHECKED, "the weights were read from an exported folder")
    checkpoint = RunDirectory(run).checkpoint(origin.step)
    if not os.path.isfile(checkpoint / MANIFEST):
        return Check(what, NOT_CHECKED, f"{run} no longer holds the checkpoint of step {origin.step}")
    try:
        if isinstance(origin.files, str):
            same = sha256_hex(read(checkpoint / MANIFEST, max_bytes=MAX_MANIFEST_BYTES)) == origin.files
        else:
            same = {
                name: entry["sha256"] for name, entry in manifest_of(checkpoint)[1]["files"].items()
            } == origin.files
    except (InputError, KeyError, TypeError, AttributeError):
        return Check(what, NOT_CHECKED, f"{checkpoint / MANIFEST} cannot be read")
    if not same:
        return Check(what, NOT_CHECKED, f"{checkpoint} has others: it was made by another run of the same lock")
    return Check(what + ", by its manifest", EQUAL)


def log_header(run: Path) -> str | None:
    """The lock digest that the step log names; None where there is no header that can be read."""
    try:
        with open_binary(run / "steps" / "000000.jsonl") as stream:
            line = stream.readline(MAX_LINE_BYTES + 1)
        return StepLogHeader.from_line(line.removesuffix(b"\n"), what="").lock_digest
    except (OSError, ValueError, InputError):
        return None


def logged_state(run: Path, step: int) -> str | None:
    """The state digest in the log's line of a step; None where there is no such line. The chain is not verified.

    Raises InputError where the line is none of a step log. Reads one segment, whatever the length of the log.
    """
    end = b'"step":%d}\n' % step
    try:
        for segment in sorted((name for name in names(run / "steps") if name.endswith(".jsonl")), reverse=True):
            with open_binary(run / "steps" / segment) as stream:
                first = stream.readline(MAX_LINE_BYTES + 1)
                if b'"step":' not in first:  # the header
                    first = stream.readline(MAX_LINE_BYTES + 1)
                if not first.endswith(b"\n") or (parse_line(first[:-1], what=segment)[0].step > step):
                    continue
                while first and not first.endswith(end):
                    first = stream.readline(MAX_LINE_BYTES + 1)
                return parse_line(first[:-1], what=f"{run}/steps/{segment}")[0].state_digest if first else None
    except OSError as error:
        raise InputError(f"could not read {run}/steps: {error.strerror or error}") from error
    return None
