"""What happened along a run and is drawn across its curves: attempts, changes of stage, checkpoints.

    marks(lock.tree, attempts, checkpoints)
    [{"kind": "attempt", "number": 1, "step": 9, "text": "attempt 1 begins; the one before: killed"}, ...]

An attempt and a stage stand at the first step that they do, a checkpoint at the step after which it was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from apertus_nemo.record.places import printable

KINDS = ("attempt", "stage", "checkpoint")
MAX_STAGES = 200  # that are marked


def marks(
    lock: Mapping[str, Any] | None,
    attempts: Sequence[Mapping[str, Any]],
    checkpoints: Sequence[Mapping[str, Any]],
    *,
    first: int = 1,
    last: int | None = None,
) -> list[dict[str, Any]]:
    """The marks at steps from `first` to `last`, by step, then by kind. The first attempt and stage have none."""
    found = [*_attempts(attempts), *_stages(lock), *_checkpoints(checkpoints)]
    inside = [mark for mark in found if first <= mark["step"] and (last is None or mark["step"] <= last)]
    return sorted(inside, key=lambda mark: (mark["step"], KINDS.index(mark["kind"]), mark["number"]))


def _mark(kind: str, number: int, step: int, text: str) -> dict[str, Any]:
    return {"kind": kind, "number": number, "step": step, "text": printable(text)}


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for before, attempt in pairwise(attempts):
        if attempt["first_step"] is not None:  # else it did no step
            text = f"attempt {attempt['number']} begins; the one before: {before['cause']}"
            found.append(_mark("attempt", attempt["number"], attempt["first_step"], text))
    return found


def _checkpoints(checkpoints: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [_mark("checkpoint", one["step"], one["step"], "checkpoint") for one in checkpoints]


def _stages(lock: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    stages = None if lock is None else lock.get("stages")
    steps = first_steps(stages)
    if not isinstance(stages, list) or steps is None:
        return []
    found = []
    for number, (step, before, stage) in enumerate(zip(steps[1:], stages, stages[1:], strict=False), 2):
        text = f"stage {number} begins" + (f": {changed}" if (changed := _changed(before, stage)) else "")
        found.append(_mark("stage", number, step, text))
    return found[:MAX_STAGES]


def first_steps(stages: Any) -> list[int] | None:
    """The first step of each stage of a lock; None where the stages do not say so in a form that we know."""
    steps, done = [], 0
    try:
        for stage in stages:
            steps.append(done + 1)
            done += int(max(0, stage["to_sample"] - stage["from_sample"]) // stage["global_batch_size"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return steps


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is other than in the stage before, in a few words."""
    data = [stage["data"] if isinstance(stage.get("data"), dict) else {} for stage in (before, now)]
    old, new = data
    said = [str(new["stage"])] if new.get("stage") != old.get("stage") and new.get("stage") else []
    for name, key, sides in (("batch", "global_batch_size", (before, now)), ("sequence", "seq_length", (old, new))):
        a, b = (side.get(key) for side in sides)
        said += [f"{name} {a} to {b}"] if a != b else []
    said += ["another mixture"] if old.get("mixture") != new.get("mixture") else []
    return ", ".join(said)
