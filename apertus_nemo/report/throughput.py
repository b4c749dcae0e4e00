"""Tokens per second by step, and when each attempt was at work, from the run's TensorBoard files.

Times are no part of a record: they stand in `logs/` alone, which no digest covers and no copy holds. Where they are not
there the report says "not recorded". A file that is broken ends the curve there: these are figures for people.

Of steps that a later attempt did again, the later attempt's values count, as TensorBoard draws them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.places import AnyPath, names, open_binary
from apertus_nemo.report.curve import Curve

FOLDER = "logs/tensorboard"
_FILE = re.compile(r"events\.out\.tfevents\.([0-9]{10})\Z")  # the number of the attempt: see training/loggers.py
_TAG = "tokens_per_second"
_HEAD = struct.Struct("<QI")  # length, its checksum
_MAX_EVENT_BYTES = 2**20
_BATCH = 4096


@dataclass
class Spell:
    """When an attempt trained, in seconds since 1970, and the steps that it did."""

    began_s: float
    ended_s: float
    first_step: int | None = None
    last_step: int | None = None


@dataclass
class Throughput:
    """What was found; nothing where no file was."""

    curve: Curve = field(default_factory=Curve)
    spells: dict[int, Spell] = field(default_factory=dict)  # by the number of the attempt
    notes: list[str] = field(default_factory=list)


def read_throughput(root: AnyPath, *, first: int = 1, last: int | None = None) -> Throughput:
    """Read the files of all attempts; the curve has the steps from `first` to `last`."""
    result = Throughput()
    folder = root / FOLDER
    try:
        found = sorted(name for name in names(folder) if _FILE.match(name))
    except OSError:
        return result
    starts = {name: _first_step(folder / name) for name in found}
    for index, name in enumerate(found):
        later = [start for other in found[index + 1 :] if (start := starts[other]) is not None]
        until = min(later, default=2**62) - 1  # what was done again is the later attempt's
        _file(folder / name, int(name[-10:]), result, first, until if last is None else min(until, last))
    return result


def _first_step(path: AnyPath) -> int | None:
    """The first step of an attempt; None where it did none."""
    try:
        for event in _events(path):
            if event.HasField("summary"):
                return int(event.step)
    except (InputError, OSError):
        pass
    return None


def _file(path: AnyPath, attempt: int, result: Throughput, first: int, last: int) -> None:
    steps: list[int] = []
    values: list[float] = []
    curve = result.curve
    before = curve.last[0] if curve.last is not None else 0
    try:
        for event in _events(path):
            spell = result.spells.setdefault(attempt, Spell(event.wall_time, event.wall_time))
            spell.ended_s = max(spell.ended_s, event.wall_time)
            value = next((item.simple_value for item in event.summary.value if item.tag == _TAG), None)
            step = int(event.step)
            if value is None:
                continue
            spell.first_step = step if spell.first_step is None else spell.first_step
            spell.last_step = step
            if step <= before or not first <= step <= last:
                continue
            before = step
            steps.append(step)
            values.append(value)
            if len(steps) == _BATCH:
                curve.extend(steps, values)
                steps, values = [], []
    except (InputError, OSError):
        result.notes.append(f"{FOLDER}/{path.name} could not be read to its end")
    curve.extend(steps, values)


def _events(path: AnyPath) -> Iterator[Any]:
    """TensorBoard's events in a file of TFRecords; its checksums are not computed. Raises InputError, OSError."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    with open_binary(path) as stream:
        while head := stream.read(_HEAD.size):
            if len(head) < _HEAD.size or (size := _HEAD.unpack(head)[0]) > _MAX_EVENT_BYTES:
                raise InputError("no event")
            data = stream.read(size + 4)
            if len(data) < size + 4:
                return  # the last one, cut off by a crash or not yet whole
            try:
                yield Event.FromString(data[:size])
            except DecodeError:
                raise InputError("no event") from None
