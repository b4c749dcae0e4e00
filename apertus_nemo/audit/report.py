"""A comparison of two runs in words, and as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from apertus_nemo.audit.compare import IDENTICAL, Comparison, LockDifference, TensorDifference, ValueDifference
from apertus_nemo.record.step_line import show

FORMAT = 1  # of the JSON
_MAX_LISTED = 5  # tensors, fields of the lock
_MAX_SHOWN = 500  # characters of a name or a note


def text(result: Comparison) -> str:
    """Lines for people: the verdict first, then what it rests on, then what was not compared."""
    lines = [_headline(result)]
    equal = [step for step in result.states_compared if result.state_step is None or step < result.state_step]
    if result.verdict != IDENTICAL and result.steps_equal:
        lines.append(f"  {result.steps_equal} of {result.steps_total} steps are equal")
    if result.values:
        lines.append(f"  step {result.values[0].step}, the first with a different value:")
        lines += [f"    {line}" for item in result.values for line in _value(item, result.labels)]
    if result.state_step is not None:
        lines.append(f"  state of step {result.state_step}, the first that differs{_share(result)}")
        lines += [f"    {_tensor(item, result.labels)}" for item in result.tensors[:_MAX_LISTED]]
        lines += _more(len(result.tensors))
    if equal:
        lines.append(f"  states with equal digests: step {_steps(equal)}")
    if result.lock:
        lines.append("  the locks differ:")
        lines += [f"    {_lock(item, result.labels)}" for item in result.lock[:_MAX_LISTED]]
        lines += _more(len(result.lock))
    lines += [f"  note: {_printable(note)}" for note in result.notes]
    lines += [f"  not compared: {_printable(item)}" for item in result.not_compared]
    return "\n".join(lines)


def _headline(result: Comparison) -> str:
    if result.verdict != IDENTICAL:
        return f"different: {result.reason}"
    steps = f"{result.steps_equal} of {result.steps_total} steps"
    if result.tensors_total is None:
        return f"identical, {steps}, every tensor by the state digest"
    tensors = f"{result.tensors_equal} of {result.tensors_total} tensors"
    last = result.states_compared[-1]
    return f"identical, {steps}, {tensors}" + (f" (at step {last})" if last != result.last_step else "")


def _share(result: Comparison) -> str:
    return "" if not result.tensors else f": {len(result.tensors)} of {result.tensors_total} tensors"


def _value(item: ValueDifference, labels: tuple[str, str]) -> list[str]:
    lines = [f"{item.name}", f"  {labels[0]} {show(item.a)}", f"  {labels[1]} {show(item.b)}"]
    if isinstance(item.a, float) and isinstance(item.b, float) and math.isfinite(item.a) and math.isfinite(item.b):
        scale = max(abs(item.a), abs(item.b))
        if scale:
            lines[0] += f" (relative difference {abs(item.a - item.b) / scale:.3g})"
    return lines


def _tensor(item: TensorDifference, labels: tuple[str, str]) -> str:
    a, b = labels
    name = f"{_printable(item.name)} ({item.kind})"
    if item.a is None or item.b is None:
        return f"{name}: only in {b if item.a is None else a}"
    if (item.a.dtype, item.a.shape) != (item.b.dtype, item.b.shape):
        return f"{name}: {item.a.dtype} {list(item.a.shape)} in {a}, {item.b.dtype} {list(item.b.shape)} in {b}"
    return f"{name}: {item.a.dtype} {list(item.a.shape)}"


def _lock(item: LockDifference, labels: tuple[str, str]) -> str:
    a, b = labels
    return f"{_printable(item.field)}: {_short(item.a)} in {a}, {_short(item.b)} in {b}"


def _short(value: Any) -> str:
    line = "absent" if value is None else json.dumps(value, sort_keys=True)
    return line if len(line) <= 80 else line[:77] + "..."


def _steps(steps: list[int]) -> str:
    if len(steps) <= 2 * _MAX_LISTED:
        return ", ".join(map(str, steps))
    head, tail = steps[:_MAX_LISTED], steps[-2:]
    return ", ".join(map(str, head)) + ", ..., " + ", ".join(map(str, tail)) + f" ({len(steps)} in all)"


def _more(count: int) -> list[str]:
    return [f"    and {count - _MAX_LISTED} more"] if count > _MAX_LISTED else []


def _printable(line: str) -> str:
    """A record may come from anywhere: nothing of it drives the terminal, or fills it."""
    if len(line) > _MAX_SHOWN:
        line = f"{line[: _MAX_SHOWN - 20]}...{line[-10:]}"
    return line if line.isprintable() else ascii(line)[1:-1]


def tree(result: Comparison) -> dict[str, Any]:
    """The same as plain data; floats as hex and decimal."""

    def value(item: Any) -> Any:
        if isinstance(item, float):
            return {"decimal": repr(item), "hex": item.hex()}
        return item

    return {
        "a": result.a,
        "b": result.b,
        "exit_code": result.exit_code,
        "format": FORMAT,
        "lock_differences": [{"a": item.a, "b": item.b, "field": item.field} for item in result.lock],
        "not_compared": result.not_compared,
        "notes": result.notes,
        "reason": result.reason or None,
        "state_step": result.state_step,
        "states_compared": result.states_compared,
        "steps_equal": result.steps_equal,
        "steps_total": result.steps_total,
        "tensor_differences": [
            {
                "a": None if item.a is None else item.a.to_list()[2:],
                "b": None if item.b is None else item.b.to_list()[2:],
                "kind": item.kind,
                "name": item.name,
            }
            for item in result.tensors
        ],
        "tensors_equal": result.tensors_equal,
        "tensors_total": result.tensors_total,
        "value_differences": [
            {"a": value(item.a), "b": value(item.b), "name": item.name, "step": item.step} for item in result.values
        ],
        "verdict": result.verdict,
    }
