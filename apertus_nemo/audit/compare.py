"""Compare two run directories: identical, or the first differing step, value and tensor.

    result = compare("runs/a", "s3://bucket/runs/b")     # run directories, or copies behind URLs
    result.verdict              # "identical" or "different"
    result.exit_code            # 0 or 1

Reads records alone: no torch, no numpy, no checkpoint. Both logs are read to their end and their chains verified
whatever is found; a broken record raises InputError. What was not compared is said in `not_compared`:
equality is never assumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import is_unknown, sha256_hex
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.places import AnyPath, locate, read
from apertus_nemo.record.seal import END, MAX_BYTES, Seal
from apertus_nemo.record.state import KINDS, StateDigest, TensorDigest
from apertus_nemo.record.step_line import StepRecord, plain
from apertus_nemo.record.step_log import StepLogReader

_MAX_LOCK_BYTES = 16 * 2**20
_MAX_STATE_BYTES = 64 * 2**20
IDENTICAL, DIFFERENT = "identical", "different"


@dataclass(frozen=True)
class ValueDifference:
    """One value of one step that is not the same in both runs."""

    step: int
    name: str
    a: int | float | str | None
    b: int | float | str | None


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both runs; None where a run has no such tensor."""

    name: str
    kind: str
    a: TensorDigest | None
    b: TensorDigest | None


@dataclass(frozen=True)
class LockDifference:
    """One field of the lock; None also stands for a field that is absent."""

    field: str
    a: Any
    b: Any


@dataclass
class Comparison:
    """What was found. Steps count from 1; the initial state is the state of step 0."""

    a: str
    b: str
    labels: tuple[str, str] = ("A", "B")  # what the two are called in words
    verdict: str = DIFFERENT
    reason: str = ""  # of the verdict "different", in one line
    steps_equal: int = 0
    steps_total: int = 0  # in either run
    last_step: int = 0  # of the longer run
    tensors_equal: int | None = None  # in the last state that was compared by name; None: no list of its tensors
    tensors_total: int | None = None
    states_compared: list[int] = field(default_factory=list)  # steps of the states whose digests were compared
    values: list[ValueDifference] = field(default_factory=list)  # at the first step that differs, cause first
    state_step: int | None = None  # first state that differs
    tensors: list[TensorDifference] = field(default_factory=list)  # in that state
    lock: list[LockDifference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 identical, 1 different."""
        return 0 if self.verdict == IDENTICAL else 1


class _Run:
    """One of the two: its lock, checked against the log, and its log."""

    def __init__(self, record: str | Path) -> None:
        self.root = locate(record)
        if not self.root.is_dir():
            raise InputError(f"{self.root} is not a folder")
        file = self.root / "lock.json"
        if not file.is_file():
            raise InputError(f"{self.root} is not a run directory: it holds no {file.name}")
        data = read(file, max_bytes=_MAX_LOCK_BYTES)
        self.lock = RunLock.from_bytes(data, what=str(file))
        self.log = StepLogReader(self.root / "steps")
        if self.log.header.lock_digest != sha256_hex(data):
            raise InputError(
                f"{file}: its lock digest is {sha256_hex(data)}, but the step log was written under "
                f"{self.log.header.lock_digest}: the lock was changed or exchanged"
            )
        self.digests: dict[int, str] = {}  # step -> state digest, where one was taken

    def state_file(self, step: int) -> AnyPath:
        """Where the tensors of a state are listed."""
        return self.root / "states" / f"step-{step:09d}.json"

    def state(self, step: int) -> StateDigest | None:
        """The tensors of a state, held against the log; None where their file is missing."""
        path = self.state_file(step)
        if not path.exists():
            return None
        state = StateDigest.from_bytes(read(path, max_bytes=_MAX_STATE_BYTES), what=str(path))
        if state.step != step or state.digest != self.digests[step]:
            raise InputError(
                f"{path}: is the state of step {state.step} with digest {state.digest}, but the log has "
                f"{self.digests[step]} for step {step}: the file was changed or exchanged"
            )
        return state

    def check_end(self) -> None:
        """Hold a log that was read to its end against `end.json`: lines cut off, and a change of the last one."""
        path = self.root / END
        if not path.exists():
            return
        mark = Seal.from_bytes(read(path, max_bytes=MAX_BYTES), what=str(path)).mark
        last = 0 if self.log.last is None else self.log.last.step
        if self.log.lines != mark.lines:
            raise InputError(
                f"{self.root / 'steps'}: the log ends at step {last}, but {path} says step {mark.last_step}: "
                "lines were cut off or added"
            )
        if self.log.hash != mark.last_line:
            raise InputError(f"{self.root / 'steps'}: the line of step {last} is not the one that {path} names")


def compare(a: str | Path, b: str | Path, *, labels: tuple[str, str] = ("A", "B")) -> Comparison:
    """Compare the records of two runs: run directories, or URLs of copies. `labels`: what words call them.

    Raises InputError where one is no record, or broken; UnfitEnvironment where an URL cannot be reached.
    """
    left, right = _Run(a), _Run(b)
    result = Comparison(str(left.root), str(right.root), labels)
    _steps(left, right, result)
    left.check_end()
    right.check_end()
    _states(left, right, result)
    result.lock = lock_differences(left.lock.tree, right.lock.tree)
    _notes(left, right, result)
    _judge(left, right, result)
    return result


def _steps(left: _Run, right: _Run, result: Comparison) -> None:
    """All values of all steps but the state digests, which `_states` takes up."""
    for one, other in _pairs(left, right):
        record = one or other
        if record is None or record.step == 0:
            continue
        result.last_step = record.step
        result.steps_total += 1
        if one is None or other is None:
            continue
        found = [] if _surely_equal(one, other) else _value_differences(one, other)
        if not found:
            result.steps_equal += 1
        elif not result.values:
            result.values = found


def _surely_equal(one: StepRecord, other: StepRecord) -> bool:
    """Quick, for the long common part of two logs; zeros go the long way, since 0.0 == -0.0."""
    return one == other and 0.0 not in (one.loss, one.grad_norm, one.learning_rate)


def _value_differences(one: StepRecord, other: StepRecord) -> list[ValueDifference]:
    theirs = other.values()
    return [
        ValueDifference(one.step, name, value, theirs[name])
        for name, value in one.values().items()
        if name != "state_digest" and plain(value) != plain(theirs[name])
    ]


def _pairs(left: _Run, right: _Run) -> Iterator[tuple[StepRecord | None, StepRecord | None]]:
    """Records of both logs by step, to the end of both; fills `digests` on the way."""
    streams = (_noting(left), _noting(right))
    one, other = (next(stream, None) for stream in streams)
    while one is not None or other is not None:
        if other is None or (one is not None and one.step < other.step):
            yield one, None
            one = next(streams[0], None)
        elif one is None or other.step < one.step:
            yield None, other
            other = next(streams[1], None)
        else:
            yield one, other
            one, other = (next(stream, None) for stream in streams)


def _noting(run: _Run) -> Iterator[StepRecord]:
    for record in run.log:
        if record.state_digest is not None:
            run.digests[record.step] = record.state_digest
        yield record


def _states(left: _Run, right: _Run, result: Comparison) -> None:
    """State digests at the steps where both have one; by name in the first that differs, else in the last."""
    common = sorted(set(left.digests) & set(right.digests))
    result.states_compared = common
    differing = [step for step in common if left.digests[step] != right.digests[step]]
    if differing:
        result.state_step = differing[0]
    elif not common:
        return
    step = differing[0] if differing else common[-1]
    one, other = left.state(step), right.state(step)
    if one is None and other is None:
        result.not_compared.append(f"tensors by name at step {step}: neither run has {left.state_file(step).name}")
        return
    if (one is None or other is None) and differing:
        which = result.labels[0 if one is None else 1]
        result.not_compared.append(f"tensors by name at step {step}: the list of {which} is missing from states/")
        return
    # Where one list is missing the digests are equal, so that the list of one is the list of both.
    mine, theirs = (
        {(tensor.name, tensor.kind): tensor for tensor in state.tensors} if state is not None else None
        for state in (one, other)
    )
    mine, theirs = mine or theirs or {}, theirs or mine or {}
    keys = sorted(mine.keys() | theirs.keys(), key=_natural)
    result.tensors_total = len(keys)
    result.tensors = [
        TensorDifference(*key, mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)
    ]
    result.tensors_equal = len(keys) - len(result.tensors)


def _natural(key: tuple[str, str]) -> tuple[list[tuple[int, str]], int]:
    """Layer 10 after layer 9; weights before the optimizer's states."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]{1,18})", key[0])]
    return parts, KINDS.index(key[1])


def lock_differences(a: Any, b: Any, prefix: str = "") -> list[LockDifference]:
    """Fields of two locks that differ, by dotted path, sorted."""
    if isinstance(a, dict) and isinstance(b, dict) and not is_unknown(a) and not is_unknown(b):
        return [
            difference
            for key in sorted(a.keys() | b.keys())
            for difference in lock_differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            difference
            for index, (one, other) in enumerate(zip(a, b, strict=True))
            for difference in lock_differences(one, other, f"{prefix}[{index}]")
        ]
    same = type(a) is type(b) and a == b
    return [] if same else [LockDifference(prefix, a, b)]


def planned_steps(lock: RunLock) -> int | None:
    """How many steps a lock asks for; None where it does not say so in a form that we know."""
    try:
        stages = [(s["from_sample"], s["to_sample"], s["global_batch_size"]) for s in lock.tree["stages"]]
        steps = sum(max(0, stop - start) // size for start, stop, size in stages)
        limit = lock.tree["config"]["trainer"]["max_steps"]
        return int(steps if limit is None else min(steps, limit))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _notes(left: _Run, right: _Run, result: Comparison) -> None:
    if left.log.header.run_id == right.log.header.run_id:
        result.notes.append("both have the same run id: one is a copy of the other, or they are one run")
    a, b = result.labels
    for label, run in ((a, left), (b, right)):
        last = run.log.last.step if run.log.last is not None else 0
        planned = planned_steps(run.lock)
        if planned is not None and last < planned:
            result.notes.append(f"{label} ends at step {last} of {planned} planned")
        if run.log.torn is not None:
            result.notes.append(f"{label}: the last line is torn and was passed over ({run.log.torn})")
    for label, run, other in ((a, left, right), (b, right, left)):
        alone = sorted(set(run.digests) - set(other.digests))
        if alone:
            steps = ", ".join(map(str, alone[:5])) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
            result.not_compared.append(f"states that only {label} has a digest of: step {steps}")
        named = run.log.header.observation_digest
        observed = run.root / "observed.json"
        if isinstance(named, str) and observed.exists() and sha256_hex(read(observed, max_bytes=MAX_BYTES)) != named:
            result.notes.append(f"{label}: observed.json is not the one that the log names")
    observations = [run.log.header.observation_digest for run in (left, right)]
    if not all(isinstance(item, str) for item in observations):
        result.not_compared.append("what was observed on the machines (observed.json)")
    elif observations[0] != observations[1]:
        result.notes.append("the machines' observations (observed.json) differ")
    if result.states_compared and result.last_step > result.states_compared[-1]:
        step = result.states_compared[-1]
        result.not_compared.append(f"tensors after step {step}: no later state has a digest in both")
    result.not_compared.append("files of checkpoints, state of random number generators, speed")


def _judge(left: _Run, right: _Run, result: Comparison) -> None:
    last = [run.log.last.step if run.log.last is not None else 0 for run in (left, right)]
    first_value = result.values[0].step if result.values else None
    if result.state_step is not None and (first_value is None or result.state_step < first_value):
        result.reason = f"the state of step {result.state_step} differs"
        if result.state_step == 0:
            result.reason = "the initial state differs"
    elif first_value is not None:
        result.reason = f"step {first_value} differs in {result.values[0].name}"
    elif last[0] != last[1]:
        shorter, longer = result.labels if last[0] < last[1] else result.labels[::-1]
        result.reason = f"{shorter} ends at step {min(last)}, {longer} goes on to step {max(last)}"
    elif left.log.torn is not None or right.log.torn is not None:
        result.reason = "a run ended while it wrote its last line"
    elif result.steps_equal != result.steps_total:
        result.reason = f"{result.steps_total - result.steps_equal} steps stand in one log only"
    elif result.steps_total == 0:
        result.reason = "no step was logged, so nothing is proven"
    elif not result.states_compared:
        result.reason = "no state has a digest in both, so nothing is proven of the tensors"
    else:
        result.verdict = IDENTICAL
