"""The curves of a step log: loss, gradient norm and learning rate by step, read in one quick pass.

    read = read_log(root / "steps", first=1, last=None)
    read.curves["loss"].points()
    read.ended            # why the pass ended before the log did; None where it did not

It takes values only. Whether the log is as it was written is the verdict of `verify`, which stands beside the
curves; a line that is none ends the pass, and the report says where.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from apertus_nemo.errors import InputError
from apertus_nemo.record.places import AnyPath, names, open_binary, printable
from apertus_nemo.record.step_line import MAX_LINE_BYTES, StepLogHeader, StepRecord, parse_line
from apertus_nemo.report.curve import Curve

NAMES = ("loss", "grad_norm", "learning_rate")

_SEGMENT = re.compile(r"[0-9]{6}\.jsonl\Z")
_BLOCK_BYTES = 2**20
_INT = r"(?:null|[0-9]{1,16})"
_FLOAT = r'"(-?0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,3})"'
_QUICK = re.compile(
    r'^\{"batch_digest":(?:null|"[0-9a-f]{64}"),'
    rf'"consumed_samples":{_INT},"consumed_tokens":([0-9]{{1,16}}),"global_batch_size":{_INT},'
    rf'"grad_norm":{_FLOAT},"learning_rate":{_FLOAT},"loss":{_FLOAT},'
    r'"previous":"[0-9a-f]{64}","state_digest":(?:null|"[0-9a-f]{64}"),"step":([1-9][0-9]{0,15})\}$',
    re.MULTILINE,
)


@dataclass
class LogValues:
    """What a log says, as far as it could be read."""

    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in NAMES})
    header: StepLogHeader | None = None
    last_step: int | None = None
    tokens: int | None = None  # consumed up to the last step
    ended: str | None = None


def read_log(folder: AnyPath, *, first: int = 1, last: int | None = None) -> LogValues:
    """Read a log; of its curves, the steps from `first` to `last`."""
    return _Reader(folder, first, last).read()


class _Reader:
    def __init__(self, folder: AnyPath, first: int, last: int | None) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._result = LogValues()
        self._begun = False  # a line of a step was read

    def read(self) -> LogValues:
        try:
            found = sorted(name for name in names(self._folder) if _SEGMENT.match(name))
            for number, name in enumerate(found):
                if name != f"{number:06d}.jsonl":
                    raise InputError(f"{number:06d}.jsonl is missing")
                self._segment(name)
        except InputError as error:
            self._result.ended = printable(str(error).removeprefix(f"{self._folder}/"))
        except OSError as error:
            self._result.ended = error.strerror or type(error).__name__
        return self._result

    def _segment(self, name: str) -> None:
        with open_binary(self._folder / name) as stream:
            rest = b""
            while block := stream.read(_BLOCK_BYTES):
                lines, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    self._lines(lines, name)
                if len(rest) > MAX_LINE_BYTES:
                    raise InputError(f"{name}: a line is longer than {MAX_LINE_BYTES} bytes")
            if rest:
                raise InputError(f"{name}: the last line is torn")

    def _lines(self, block: bytes, name: str) -> None:
        if self._result.header is None:
            head, _, block = block.partition(b"\n")
            self._result.header = StepLogHeader.from_line(head, what=name)
            if not block:
                return
        found = _QUICK.findall(block.decode("latin-1"))
        steps = [int(match[4]) for match in found]
        before = self._result.last_step or 0
        if len(found) != block.count(b"\n") + 1 or steps != list(range(before + 1, before + 1 + len(found))):
            for line in block.split(b"\n"):
                self._one(parse_line(line, what=name)[0], name)
            return
        self._result.last_step, self._result.tokens = steps[-1], int(found[-1][0])
        self._begun = True
        begin = max(0, self._first - steps[0])
        end = len(steps) if self._last is None else max(begin, self._last + 1 - steps[0])
        for column, curve in ((1, "grad_norm"), (2, "learning_rate"), (3, "loss")):
            values = [float.fromhex(match[column]) for match in found[begin:end]]
            self._result.curves[curve].extend(steps[begin:end], values)

    def _one(self, record: StepRecord, name: str) -> None:
        """A line of an unusual form: the initial state, or a value that is missing or not finite."""
        result = self._result
        if record.step != (0 if result.last_step is None else result.last_step + 1) and self._begun:
            raise InputError(f"{name}: step {record.step} follows step {result.last_step}")
        self._begun, result.last_step = True, record.step
        result.tokens = record.consumed_tokens if record.consumed_tokens is not None else result.tokens
        if record.step < self._first or (self._last is not None and record.step > self._last):
            return
        for curve in NAMES:
            value = getattr(record, curve)
            if value is not None:
                result.curves[curve].extend([record.step], [value])
