"""What a recipe leaves to whoever runs it, and a plan does without: where data and weights lie, and seeds of stages."""

from __future__ import annotations

from typing import Any

_FOLDER = "open"  # never looked at
_LARGEST_SEED = 2**32 - 1


def stand_in(tree: Any) -> tuple[str, ...]:
    """Put a stand-in for each such value of a composed tree that has none, in place; their dotted keys.

    Whatever else has no value, or one that is wrong, stays as it is, and is refused as ever.
    """
    found = []
    data, initial = (_mapping(_mapping(tree).get(section)) for section in ("data", "initial"))
    if data.get("source") == "built" and data.get("path") is None:
        data["path"] = _FOLDER
        found.append("data.path")
    if initial.get("kind", "none") != "none" and initial.get("path") is None:
        initial["path"] = _FOLDER
        found.append("initial.path")
    stages = data.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if _mapping(stage).get("seed") == "???":
            stage["seed"] = _LARGEST_SEED - index  # another one for each stage
            found.append(f"data.stages.{index}.seed")
    return tuple(found)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
