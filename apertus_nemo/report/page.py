"""The report as one HTML file that needs nothing else: `page(gather([...]))`.

Every text of a record passes `printable` (control characters and marks of writing direction become escapes) and
Jinja's escaping. The page's own policy forbids it every request, and every script but the ones with the hashes in it.
The same data give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from apertus_nemo import __version__
from apertus_nemo.record.places import printable
from apertus_nemo.report.marks import KINDS

MARK = b"<!doctype html>\n<!-- apertus-nemo report -->\n"  # how a report begins

# name of the curve -> (title, what is drawn)
CURVES = {
    "loss": ("Loss", "mean over the loss tokens of a batch"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", ""),
    "tokens_per_second": ("Throughput", "tokens per second"),
}
_MOODS = {"identical": "good", "different": "open", "whole": "good", "whole so far": "open", "changed": "bad"}
_SIGNS = {"identical": "=", "different": "≠", "whole": "✓", "whole so far": "…", "changed": "✕"}
_NAMED_MARKS = 12  # of a kind, in words
_ONE = {
    "attempt": "another attempt begins with",
    "stage": "another stage begins with",
    "checkpoint": "a checkpoint after",
}
_MEANINGS = {
    "whole": "Every file that a digest covers is as it was written, to the end of the run.",
    "whole so far": "What is sealed is as it was written; the run has not ended, or not been sealed to its end.",
    "changed": "The record is not as it was written.",
}


def page(report: Mapping[str, Any]) -> bytes:
    """The HTML of what `gather` returned."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_finalize)
    filters: dict[str, Callable[[Any], str]] = {
        "duration": _duration,
        "meaning": lambda found: _MEANINGS[found["verdict"]],
        "mood": lambda found: _MOODS.get(found["verdict"], "none"),
        "number": lambda value: "–" if value is None else f"{value:,}",
        "sentence": lambda text: text[:1].upper() + text[1:],
        "sign": lambda found: _SIGNS.get(found["verdict"], "?"),
        "size": _size,
        "time": _time,
    }
    environment.filters.update(filters)
    plotly, script = get_plotlyjs(), _own("page.js")
    runs = report["runs"]
    html = environment.from_string(_own("page.html")).render(
        charts=[_chart(name, report) for name in CURVES],
        comparisons=report["comparisons"],
        css=Markup(_own("page.css")),
        data=Markup(_data(report)),
        kinds=[kind for kind in KINDS if any(mark["kind"] == kind for run in runs for mark in run["marks"])],
        marked=[(run["label"], text) for run in runs if (text := _marked(run["marks"]))],
        numbers=[_numbers(name, run) for name in CURVES for run in runs if run["curves"][name]["count"]],
        plotly=Markup(plotly),
        plotly_version=_plotly_version(plotly),
        policy=Markup(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
            f"script-src {_hash(plotly)} {_hash(script)}"
        ),
        runs=runs,
        script=Markup(script),
        title=runs[0]["name"] if len(runs) == 1 else _title(report),
        version=__version__,
        what=_what(runs),
    )
    return html.encode("utf-8", errors="backslashreplace")


def _own(name: str) -> str:
    return (files("apertus_nemo.report") / name).read_text(encoding="utf-8")


def _finalize(value: Any) -> Any:
    """Of a record's text, nothing but what can be seen; markup of our own stays as it is."""
    if isinstance(value, str) and not hasattr(value, "__html__") and not value.isprintable():
        return printable(value)
    return value


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _plotly_version(script: str) -> str:
    found = re.match(r"/\*\*\n\* plotly\.js v([0-9.]+)", script)
    return found[1] if found else ""


def _title(report: Mapping[str, Any]) -> str:
    runs, verdicts = report["runs"], [item["verdict"] for item in report["comparisons"]]
    if all(verdict == "identical" for verdict in verdicts):
        return f"{len(runs)} runs, identical"
    return f"{len(runs)} runs side by side"


def _data(report: Mapping[str, Any]) -> str:
    """What the script needs, as JSON that cannot end its element."""
    drawn = ("steps", "values", "stretch")
    runs = [
        {
            "curves": {name: {key: run["curves"][name][key] for key in drawn} for name in CURVES},
            "label": run["label"],
            "marks": [[mark["kind"], mark["step"], mark["number"], mark["text"]] for mark in run["marks"]],
        }
        for run in report["runs"]
    ]
    curves = [run["curves"][name] for run in report["runs"] for name in CURVES]
    steps = [step for curve in curves for step in curve["steps"][:1] + curve["steps"][-1:]]
    tree = {"first": min(steps, default=0), "last": max(steps, default=0), "names": list(CURVES), "runs": runs}
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _chart(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """One figure: what it says in words, and what must be said of it."""
    title, unit = CURVES[name]
    several = len(report["runs"]) > 1
    words, notes = [], []
    for run in report["runs"]:
        curve, who = run["curves"][name], f"{run['label']}: " if several else ""
        if not curve["count"]:
            notes.append(who + str(curve["absent"]))
            continue
        (first, begin), (last, end) = (curve["steps"][0], curve["values"][0]), curve["last"]
        words.append(f"{who}{begin:.5g} at step {first} to {end:.5g} at step {last}")
        if curve["stretch"] > 1:
            notes.append(
                f"{who}drawn are the smallest and the largest value of every {curve['stretch']:,} steps; "
                "all steps of a part: --steps FIRST-LAST"
            )
        if curve["not_finite"]:
            notes.append(f"{who}{curve['not_finite']:,} values are not finite and not drawn")
    return {
        "drawn": bool(words),
        "name": name,
        "notes": notes,
        "title": title,
        "unit": unit,
        "words": f"{title} by step. " + "; ".join(words),
    }


def _marked(marks: list[dict[str, Any]]) -> str:
    """The marks of a run in words: for who sees no drawing, and for paper."""
    said = []
    for kind, words in (
        ("attempt", "attempts begin with"),
        ("stage", "stages begin with"),
        ("checkpoint", "checkpoints after"),
    ):
        steps = list(dict.fromkeys(mark["step"] for mark in marks if mark["kind"] == kind))
        if steps:
            more = f" and {len(steps) - _NAMED_MARKS} more" if len(steps) > _NAMED_MARKS else ""
            text = ", ".join(f"{step:,}" for step in steps[:_NAMED_MARKS])
            said.append(f"{words if len(steps) > 1 else _ONE[kind]} step{'s' * (len(steps) > 1)} {text}{more}")
    return "; ".join(said)


def _numbers(name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    curve = run["curves"][name]
    digits = ".1f" if name == "tokens_per_second" else ".9g"
    points = [
        (point[0], format(point[1], "," + digits if name == "tokens_per_second" else digits))
        for point in (curve["last"], curve["smallest"], curve["largest"])
    ]
    return {**curve, "label": run["label"], "points": points, "title": CURVES[name][0]}


def _what(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of rows with a cell a run; the run's own identity first."""
    identity = [
        {
            "run id": run["lineage"]["run_id"],
            "name": run["name"],
            "lock digest": f"sha256:{run['lock_digest']}" if run["lock_digest"] else None,
            **run["lineage"]["initial_state"],
            "relaunch of": _relaunch(run["lineage"]["relaunch_of"]),
            "allowed to differ": _allowed(run["lineage"]["allowed"]),
        }
        for run in runs
    ]
    tables = [{"Run": mine, **run["what"]} for mine, run in zip(identity, runs, strict=True)]
    order = list(dict.fromkeys(group for table in tables for group in table))
    groups = []
    for group in order:
        names = list(dict.fromkeys(name for table in tables for name in table.get(group, {})))
        rows = []
        for name in names:
            cells = [table.get(group, {}).get(name) for table in tables]
            if any(cell is not None for cell in cells):
                rows.append({"cells": cells, "differs": name != "run id" and len(set(cells)) > 1, "name": name})
        groups.append({"name": group, "rows": rows})
    return groups


def _relaunch(of: Mapping[str, Any] | None) -> str | None:
    if of is None:
        return None
    return f"run {of['run_id']}" + (f" ({of['label']})" if of["label"] else "")


def _allowed(items: list[dict[str, str]]) -> str | None:
    return "; ".join(f"{i['field']}: {i['locked']} locked, {i['found']} found" for i in items) or None


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "an impossible time"


def _duration(seconds: float) -> str:
    if not 0 <= seconds < 10**10:
        return "for an impossible time"
    if seconds < 120:
        return f"for {seconds:.0f} s"
    if seconds < 7200:
        return f"for {seconds / 60:.0f} min"
    return f"for {seconds / 3600:.1f} h"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:,.1f} {unit}"
