"""What a report shows, as plain data: of each run what ran, curves, attempts, checkpoints and verdicts.

    report = gather(["runs/a", "runs/b"])        # run directories, or URLs of copies
    report["runs"][0]["verification"]["verdict"]
    report["comparisons"][0]["verdict"]          # of the first run with each other one

`apertus-nemo report --json` prints it. Verdicts are computed now, by `audit`; nothing is taken from an earlier report.
A record that is broken is reported as broken: what can be read of it is shown, and what cannot is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apertus_nemo.audit import report as compare_words
from apertus_nemo.audit import verify_report
from apertus_nemo.audit.compare import compare, planned_steps
from apertus_nemo.audit.verify import verify
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.record.canonical import is_digest, is_unknown, loads_canonical
from apertus_nemo.record.lock import RELAUNCH, RunLock
from apertus_nemo.record.places import AnyPath, locate, names, printable, read
from apertus_nemo.report.attempts import read_attempts
from apertus_nemo.report.curve import Curve
from apertus_nemo.report.log_values import NAMES, LogValues, read_log
from apertus_nemo.report.marks import marks
from apertus_nemo.report.throughput import FOLDER, Throughput, read_throughput
from apertus_nemo.report.what_ran import groups, list_text, value_text

FORMAT = 1
MAX_RUNS = 26  # they are called A to Z
MAX_CHECKPOINTS = 200  # listed
MAX_LISTED = 50  # findings, differences
_MAX_BYTES = 16 * 2**20
_MAX_NAMED = 8  # values of a mapping, shown one by one
_CHECKPOINT = re.compile(r"step-([0-9]{9})\Z")
_HEX = re.compile(r"\b[0-9a-f]{64}\b")

Steps = tuple[int, int | None]  # first and last of the curves


def gather(records: Sequence[str], *, check: bool = True, steps: Steps = (1, None)) -> dict[str, Any]:
    """The report of some records. `check`: verify each, and compare the first with each other one.

    Raises InputError where one is no record, UnfitEnvironment where an URL cannot be reached.
    """
    if len(records) > MAX_RUNS:
        raise InputError(f"{len(records)} runs are too many for one report: it shows {MAX_RUNS} at most")
    runs = [_run(record, chr(ord("A") + index), check, steps) for index, record in enumerate(records)]
    _lineage(runs)
    others = list(zip(records, runs, strict=True))[1:]
    return {
        "comparisons": [_compare(records[0], record, runs[0], run, check) for record, run in others],
        "first_step": steps[0],
        "format": FORMAT,
        "last_step": steps[1],
        "runs": runs,
    }


def _run(record: str, label: str, check: bool, steps: Steps) -> dict[str, Any]:
    root = locate(record)
    verification = _verification(root, record, check)
    lock, lock_problem = _lock(root)
    read = read_log(root / "steps", first=steps[0], last=steps[1])
    speed = read_throughput(root, first=steps[0], last=steps[1])
    planned = None if lock is None else planned_steps(lock)
    attempts, left_out = read_attempts(root, speed.spells)
    checkpoints = _checkpoints(root)
    last = min(steps[1] or 2**62, read.last_step or 0)
    observed = _json(root, "observed.json")
    notes = [] if read.ended is None else [f"the curves end after step {read.last_step or 0}: {read.ended}"]
    if lock_problem is not None:
        notes.append(f"what ran is not known: {lock_problem}")
    return {
        "attempts": attempts,
        "attempts_left_out": left_out,
        "checkpoints": checkpoints,
        "curves": _curves(read, speed),
        "label": label,
        "last_step": read.last_step,
        "lineage": _origin(root, lock, read),
        "lock_digest": None if lock is None else lock.digest,
        "marks": marks(None if lock is None else lock.tree, attempts, checkpoints["listed"], first=steps[0], last=last),
        "name": _name(lock, root),
        "notes": notes + speed.notes,
        "place": printable(str(root)),
        "planned_steps": planned,
        "tokens": read.tokens,
        "verification": verification,
        "what": groups(None if lock is None else lock.tree, observed if isinstance(observed, dict) else None),
    }


def _verification(root: AnyPath, record: str, check: bool) -> dict[str, Any]:
    if not check:
        if isinstance(root, Path) and not root.is_dir():
            raise InputError(f"{root} is not a folder")
        if not (root / "lock.json").exists() and not names(root / "steps"):
            raise InputError(f"{root} is not the record of a run: it holds neither lock.json nor a step log")
        return {
            "checkpoints": [],
            "findings": [],
            "findings_in_all": 0,
            "headline": "not verified",
            "not_checked": ["anything: --no-verify was given"],
            "notes": [],
            "verdict": None,
        }
    result = verify(record)
    words = verify_report.text(result).splitlines()
    found = verify_report.tree(result)
    found["findings_in_all"] = len(found["findings"])
    found["findings"] = found["findings"][:MAX_LISTED]
    found["record"] = printable(found["record"])
    checked = next((line.strip() for line in words if line.startswith("  checked: ")), "")
    return {**found, "checked": checked.removeprefix("checked: "), "headline": words[0]}


def _lock(root: AnyPath) -> tuple[RunLock | None, str | None]:
    try:
        return RunLock.from_bytes(read(root / "lock.json", max_bytes=_MAX_BYTES), what="lock.json"), None
    except InputError as error:
        return None, printable(str(error))


def _json(root: AnyPath, name: str) -> Any:
    """A small file of the record; None where it is not there, or is none."""
    path = root / name
    if not path.is_file():
        return None
    try:
        return loads_canonical(read(path, max_bytes=_MAX_BYTES), what=name)
    except InputError:
        return None


def _name(lock: RunLock | None, root: AnyPath) -> str:
    config = lock.tree["config"] if lock is not None else None
    name = config.get("name") if isinstance(config, dict) else None
    return printable(name) if isinstance(name, str) and name else printable(root.name or str(root))


def _curves(read: LogValues, speed: Throughput) -> dict[str, Any]:
    found: dict[str, Any] = {name: _curve(read.curves[name]) for name in NAMES}
    found["tokens_per_second"] = _curve(speed.curve)
    if not speed.curve.count:
        found["tokens_per_second"]["absent"] = f"not recorded: nothing of these steps stands in {FOLDER}/"
    for name in NAMES:
        if not read.curves[name].count:
            found[name]["absent"] = "not recorded: the log has no finite value of these steps"
    return found


def _curve(curve: Curve) -> dict[str, Any]:
    steps, values = curve.points()
    return {
        "count": curve.count,
        "largest": curve.largest,
        "last": curve.last,
        "not_finite": curve.not_finite,
        "not_finite_steps": curve.not_finite_steps,
        "smallest": curve.smallest,
        "steps": steps,
        "stretch": curve.stretch,
        "values": values,
    }


def _checkpoints(root: AnyPath) -> dict[str, Any]:
    """The folders that are there, and what their manifests say of them; `verify` says whether they are whole."""
    try:
        steps = sorted(int(match[1]) for name in names(root / "checkpoints") if (match := _CHECKPOINT.match(name)))
    except OSError:
        steps = []
    shown = steps if len(steps) <= MAX_CHECKPOINTS else steps[: MAX_CHECKPOINTS // 2] + steps[-MAX_CHECKPOINTS // 2 :]
    return {"in_all": len(steps), "listed": [_checkpoint(root, step) for step in shown]}


def _checkpoint(root: AnyPath, step: int) -> dict[str, Any]:
    tree = _json(root, f"checkpoints/step-{step:09d}/manifest.json")
    files = tree.get("files") if isinstance(tree, dict) else None
    found: dict[str, Any] = {"files": None, "size_bytes": None, "step": step}
    if isinstance(files, dict):
        sizes: list[Any] = [entry.get("size_bytes") for entry in files.values() if isinstance(entry, dict)]
        if all(type(size) is int for size in sizes):
            found |= {"files": len(files), "size_bytes": sum(sizes)}
    return found


def _origin(root: AnyPath, lock: RunLock | None, read: LogValues) -> dict[str, Any]:
    """Where a run comes from: its id, the run that it is the relaunch of, and what was let differ."""
    found: dict[str, Any] = {
        "allowed": [],
        "initial_state": {} if lock is None else _initial_state(lock.tree["initial_state"]),
        "relaunch_of": None,
        "run_id": None if read.header is None else read.header.run_id,
    }
    of = _json(root, "relaunch.json")
    of = of.get("relaunch_of") if isinstance(of, dict) else None
    if isinstance(of, dict):
        digest, run_id = of.get("lock_digest"), of.get("run_id")
        found["relaunch_of"] = {
            "label": None,
            "lock_digest": digest if is_digest(digest) else None,
            "run_id": printable(run_id) if isinstance(run_id, str) else None,
        }
    allowed = lock.tree.get(RELAUNCH) if lock is not None else None
    allowed = allowed.get("allowed") if isinstance(allowed, dict) else None
    if isinstance(allowed, list):
        found["allowed"] = [
            {name: value_text(item.get(name)) for name in ("field", "locked", "found")}
            for item in allowed[:MAX_LISTED]
            if isinstance(item, dict)
        ]
    return found


def _initial_state(tree: Any) -> dict[str, str]:
    """What a run began with, name by name: whatever the lock says of it is shown."""
    if tree == {"kind": "none"}:
        return {"initial state": "none: from the seed"}
    if not isinstance(tree, dict) or is_unknown(tree) or not tree:
        return {"initial state": value_text(tree)}
    found = {"initial state": value_text(tree.get("kind"))}
    for name, value in sorted(tree.items()):
        if name != "kind":
            many = isinstance(value, dict) and len(value) > _MAX_NAMED  # files, each with its hash
            found[f"initial {printable(name).replace('_', ' ')}"] = list_text(value) if many else value_text(value)
    return found


def _lineage(runs: list[dict[str, Any]]) -> None:
    """Name the original of a relaunch, and the run that an initial state is of, by letter where they are shown."""
    labels = {run["lineage"]["run_id"]: run["label"] for run in reversed(runs)}
    locks = {run["lock_digest"]: run["label"] for run in reversed(runs) if run["lock_digest"] is not None}
    for run in runs:
        of = run["lineage"]["relaunch_of"]
        if of is not None and of["run_id"] is not None:
            of["label"] = labels.get(of["run_id"])
        for name, text in run["lineage"]["initial_state"].items():
            for digest in _HEX.findall(text):
                if digest in locks and locks[digest] != run["label"]:
                    run["lineage"]["initial_state"][name] += f" (the lock digest of {locks[digest]})"


def _side(value: Any) -> str:
    return "absent" if value is None else value_text(value)


def _compare(a: str, b: str, one: dict[str, Any], other: dict[str, Any], check: bool) -> dict[str, Any]:
    """The verdict of `compare`, or why there is none."""
    found: dict[str, Any] = {"a": one["label"], "b": other["label"], "verdict": None}
    found |= {"details": [], "lock_differences": [], "lock_differences_in_all": 0, "not_compared": [], "notes": []}
    if not check:
        return {**found, "headline": "not compared: --no-verify was given"}
    try:
        result = compare(a, b, labels=(one["label"], other["label"]))
    except ApertusError as error:
        return {**found, "headline": printable(f"not compared: {error}")}
    tree = compare_words.tree(result)
    # The locks, notes and what was not compared stand in lists of their own.
    bare = replace(result, lock=[], notes=[], not_compared=[])
    lines = compare_words.text(bare).splitlines()
    return {
        **found,
        "details": [printable(line.removeprefix("  ")) for line in lines[1:]],
        "headline": printable(lines[0]),
        "lock_differences": [
            {"a": _side(item.a), "b": _side(item.b), "field": printable(item.field)}
            for item in result.lock[:MAX_LISTED]
        ],
        "lock_differences_in_all": len(result.lock),
        "not_compared": [printable(item) for item in tree["not_compared"]],
        "notes": [printable(note) for note in tree["notes"]],
        "state_step": tree["state_step"],
        "steps_equal": tree["steps_equal"],
        "steps_total": tree["steps_total"],
        "tensors_equal": tree["tensors_equal"],
        "tensors_total": tree["tensors_total"],
        "verdict": tree["verdict"],
    }
