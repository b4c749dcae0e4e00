"""Records for the tests of reports: sealed ones, with output of ranks and TensorBoard's files beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from apertus_nemo.record.lock import RunLock
from tests.unit.audit.sealed import make_sealed
from tests.unit.record.example import lock

T0 = 1_795_000_000.0  # seconds since 1970

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202egnp\x1b[31m&amp;\x00'\"{{7*7}}"


def sealed(path: Path, **options: Any) -> Path:
    """A finished run of 20 steps and two attempts, the segments of its log as long as everywhere."""
    return make_sealed(path, segment_lines=100_000, **options)


def lock_with(changes: Mapping[str, Any]) -> RunLock:
    """The example's lock with values changed by dotted path."""
    import json

    tree = json.loads(lock().to_bytes())
    for place, value in changes.items():
        *parents, last = place.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node[last] = value
    return RunLock(tree)


def events(run: Path, attempt: int, steps: Iterable[int], *, speed: float = 100.0, began_s: float = T0) -> Path:
    """The file that `training/loggers.py` leaves of an attempt: a step a second, `speed` plus the step."""
    folder = run / "logs" / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{attempt:010d}"
    with path.open("wb") as stream:
        writer = RecordWriter(stream)
        writer.write(Event(wall_time=began_s, file_version="brain.Event:2").SerializeToString())
        start = SessionLog(status=SessionLog.START)
        steps = list(steps)
        writer.write(Event(wall_time=began_s, step=steps[0], session_log=start).SerializeToString())
        for count, step in enumerate(steps, 1):
            values = {"loss": 1.0, "tokens_per_second": speed + step}
            summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
            writer.write(Event(wall_time=began_s + count, step=step, summary=summary).SerializeToString())
    return path
