"""The chain of a step log: verified at the speed of hashing, and searched for the place where it was broken.

    chain = read_chain(folder, marks={1_000_001: "<SHA-256>"})
    chain.findings          # empty: every line holds the hash of the one before, steps follow each other
    chain.hashes            # line count -> hash of that line, for the marks asked for

The quick pass takes blocks, one regular expression and one SHA-256 a line, and gives up at anything unusual. The slow
pass then reads the log again and says which line was changed, inserted, moved or lost: a line whose hash the next
line holds is as it was written, and so is, from there, the one that it names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from apertus_nemo.audit.finding import Finding
from apertus_nemo.errors import InputError
from apertus_nemo.record.places import AnyPath, names, open_binary, printable
from apertus_nemo.record.step_line import MAX_LINE_BYTES, StepLogHeader, StepRecord, parse_line
from apertus_nemo.record.step_log import SEGMENT_LINES

MAX_FINDINGS = 200  # of one log

_SEGMENT = re.compile(r"([0-9]{6})\.jsonl\Z")
_BLOCK_BYTES = 2**20
# A stricter form of `step_line._LINE`: floats that it admits are canonical. Rare ones (NaN, subnormal, exponents of
# four digits) are left to `parse_line`.
_INT = rb"(?:null|0|[1-9][0-9]{0,15}+)"
_FLOAT = rb'(?:null|"-?0x(?:1\.[0-9a-f]{13}+p(?:\+0|[+-][1-9][0-9]{0,2}+)|0\.0p\+0)")'
_SHA = rb'(?:null|"[0-9a-f]{64}+")'
_QUICK = re.compile(
    rb'\{"batch_digest":'
    + _SHA
    + rb',"consumed_samples":'
    + _INT
    + rb',"consumed_tokens":'
    + _INT
    + rb',"global_batch_size":'
    + _INT
    + rb',"grad_norm":'
    + _FLOAT
    + rb',"learning_rate":'
    + _FLOAT
    + rb',"loss":'
    + _FLOAT
    + rb',"previous":"([0-9a-f]{64}+)","state_digest":(null|"[0-9a-f]{64}+"),'
    rb'"step":(0|[1-9][0-9]{0,15}+)\}\n'
)


@dataclass
class Chain:
    """What a log holds; complete lines only."""

    header: StepLogHeader | None = None
    header_hash: str = ""
    segments: list[str] = field(default_factory=list)  # names of the files that were read, in order
    lines: int = 0  # the header included
    first_step: int | None = None
    last_step: int | None = None
    last_hash: str = ""
    states: dict[int, str] = field(default_factory=dict)  # step -> state digest
    hashes: dict[int, str] = field(default_factory=dict)  # number of lines -> hash of the last of them
    torn: Finding | None = None  # a last line without its newline: what a crash leaves
    findings: list[Finding] = field(default_factory=list)
    blamed_steps: set[int] = field(default_factory=set)  # steps whose lines are not as they were written
    header_is_blamed: bool = False


class _Unusual(Exception):
    """The quick pass leaves this log to the slow one."""


def read_chain(
    folder: AnyPath,
    *,
    marks: Mapping[int, str] = MappingProxyType({}),
    header: str | None = None,
    segment_lines: int = SEGMENT_LINES,
) -> Chain:
    """Verify the log in `folder` (a run directory's `steps`).

    Args:
        marks: what seals say: number of lines -> SHA-256 of the last of them. The hashes that are found are given
            back, not judged.
        header: SHA-256 of the first line, where a seal names it.

    Raises OSError or InputError where a file cannot be read; all else is a finding.
    """
    found = sorted(name for name in names(folder) if _SEGMENT.match(name))
    if found == [f"{number:06d}.jsonl" for number in range(len(found))]:
        try:
            return _quick(folder, found, marks, segment_lines)
        except _Unusual:
            pass
    return _Slow(folder, found, marks, header, segment_lines).run()


def _quick(folder: AnyPath, segments: list[str], marks: Mapping[int, str], segment_lines: int) -> Chain:
    chain = Chain(segments=segments)
    match, sha256 = _QUICK.match, hashlib.sha256
    lines, expected, before = 0, -1, ""
    remaining = sorted(marks, reverse=True)
    mark = remaining.pop() if remaining else -1
    for number, name in enumerate(segments):
        end_of_segment = (number + 1) * segment_lines
        rest = b""
        with open_binary(folder / name) as stream:
            while block := stream.read(_BLOCK_BYTES):
                data, position = rest + block, 0
                if lines == 0:
                    stop = data.find(b"\n", 0, MAX_LINE_BYTES)
                    if stop < 0:
                        raise _Unusual
                    chain.header, before = _header(data[:stop])
                    chain.header_hash = before
                    lines, position = 1, stop + 1
                    if mark == 1:
                        chain.hashes[1] = before
                        mark = remaining.pop() if remaining else -1
                while (line := match(data, position)) is not None:
                    previous, state, step = line.groups()
                    if previous.decode() != before or lines == end_of_segment:
                        raise _Unusual
                    logged = int(step)
                    if logged != expected:
                        if expected >= 0:
                            raise _Unusual
                        chain.first_step = logged
                    expected = logged + 1
                    stop = line.end()
                    before = sha256(data[position : stop - 1]).hexdigest()
                    position = stop
                    lines += 1
                    if state != b"null":
                        chain.states[logged] = state[1:-1].decode()
                    if lines == mark:
                        chain.hashes[lines] = before
                        mark = remaining.pop() if remaining else -1
                rest = data[position:]
                if len(rest) > MAX_LINE_BYTES or b"\n" in rest:
                    raise _Unusual
        if rest or (lines != end_of_segment and number != len(segments) - 1):
            raise _Unusual
    chain.lines, chain.last_hash = lines, before
    chain.last_step = expected - 1 if expected >= 0 else None
    return chain


def _header(line: bytes) -> tuple[StepLogHeader, str]:
    try:
        return StepLogHeader.from_line(line, what=""), hashlib.sha256(line).hexdigest()
    except InputError:
        raise _Unusual from None


@dataclass
class _Line:
    """One line in the slow pass."""

    file: str
    number: int  # from 1, in the file
    hash: str
    torn: bool = False
    after_gap: bool = False  # a segment before it is missing
    header: StepLogHeader | None = None
    record: StepRecord | None = None
    previous: str = ""
    reason: str = ""  # why it is neither

    def follows(self, other: _Line | None) -> bool:
        """Holds the hash of `other`."""
        return other is not None and self.record is not None and self.previous == other.hash

    def finding(self, what: str) -> Finding:
        return Finding(self.file, what, self.number, None if self.record is None else self.record.step)


class _Slow:
    """One pass over a log that is not in order, with a view of the line before and the two after."""

    def __init__(
        self, folder: AnyPath, segments: list[str], marks: Mapping[int, str], header: str | None, segment_lines: int
    ) -> None:
        self._folder, self._marks, self._sealed_header = folder, marks, header
        self._segment_lines = segment_lines
        self.chain = Chain(segments=segments)
        self._short: list[Finding] = []  # segments with a wrong number of lines
        self._base: _Line | None = None  # the last line that belongs to the log
        self._base_is_blamed = False
        self._expected: set[int] = set()  # steps that may come next; none: any
        self._last: tuple[int, str] | None = None

    def run(self) -> Chain:
        chain = self.chain
        window: list[_Line] = []  # a line and the two after it
        for line in self._lines():
            window.append(line)
            if len(window) == 3:
                self._take(window.pop(0), *window)
        while window:
            self._take(window.pop(0), *window)
        if not chain.findings:
            chain.findings = self._short
        return chain

    def _lines(self) -> Iterator[_Line]:
        expected, total = 0, 0
        for index, name in enumerate(self.chain.segments):
            number = int(name[:6])
            gap = number != expected
            for missing in range(expected, min(number, expected + MAX_FINDINGS)):
                self._report(Finding(f"steps/{missing:06d}.jsonl", "is missing"))
            expected = number + 1
            inside = 0
            with open_binary(self._folder / name) as stream:
                while data := stream.readline(MAX_LINE_BYTES + 1):
                    inside += 1
                    line = _Line(f"steps/{name}", inside, "", after_gap=gap)
                    gap = False
                    if data[-1:] != b"\n":
                        line.torn = True
                        line.reason = "has no end"
                        if len(data) > MAX_LINE_BYTES:
                            line.reason = f"is longer than {MAX_LINE_BYTES} bytes"
                            while len(data) > MAX_LINE_BYTES and data[-1:] != b"\n":
                                data = stream.readline(MAX_LINE_BYTES + 1)
                            line.torn = data[-1:] != b"\n"
                        yield line
                        continue
                    data = data[:-1]
                    line.hash = hashlib.sha256(data).hexdigest()
                    try:
                        if total == 0:
                            line.header = StepLogHeader.from_line(data, what="")
                        else:
                            line.record, line.previous = parse_line(data, what="")
                    except InputError as error:
                        line.reason = printable(str(error).removeprefix(": "))
                    total += 1
                    yield line
            last = index == len(self.chain.segments) - 1
            if inside != self._segment_lines and not (last and inside < self._segment_lines):
                what = f"has {inside} lines, not {self._segment_lines}"
                self._short.append(Finding(f"steps/{name}", what, min(inside, self._segment_lines) + 1))

    def _take(self, line: _Line, after: _Line | None = None, later: _Line | None = None) -> None:
        """Judge one line, knowing what came before and the two lines that come after."""
        chain = self.chain
        if line.torn and after is None:
            chain.torn = line.finding("is torn: it was cut off, or a crash left it")
            return
        chain.lines += 1
        if chain.lines in self._marks:
            chain.hashes[chain.lines] = line.hash
        chain.last_hash = line.hash
        if self._base is None:
            self._first(line)
        elif line.record is None:
            if after is not None and after.follows(self._base):
                self._blame(line, "was inserted")
                return
            self._blame(line, f"was changed: {line.reason}")
            self._go_on(line, blamed=True, steps={step + 1 for step in self._expected})
        else:
            self._step(line, line.record, after, later)

    def _first(self, line: _Line) -> None:
        chain = self.chain
        chain.header, chain.header_hash = line.header, line.hash
        wrong = line.header is None or (self._sealed_header is not None and line.hash != self._sealed_header)
        if wrong and not line.after_gap:
            self._blame(line, f"was changed: {line.reason or 'its hash is not the one that a seal names'}")
        chain.header_is_blamed = wrong
        self._go_on(line, blamed=wrong, steps=set())

    def _step(self, line: _Line, record: StepRecord, after: _Line | None, later: _Line | None) -> None:
        base = self._base
        assert base is not None
        linked = line.follows(base) or self._base_is_blamed or line.after_gap
        in_order = not self._expected or record.step in self._expected or line.after_gap
        if after is not None and after.follows(base):
            # Of two lines that follow the base, the one that the third follows is as it was; of equal ones, the first.
            other = later.follows(after) if later is not None else self._is_sealed(after)
            if not linked or (other and after.hash != line.hash):
                self._blame(line, "was inserted: the lines before and after it belong together")
                return
        blamed = False
        if not in_order and not linked and self.chain.lines == 3 and record.step < min(self._expected):
            self._blame(base, f"was changed: step {record.step} follows it")  # nothing told its step before
        elif not in_order:
            self._blame(line, self._out_of_order(record.step))
            blamed = not (after is not None and after.follows(line))
        elif not linked:
            genuine = self._is_sealed(line) if after is None else after.follows(line)
            if not self._expected and record.step != 0:
                self._blame(line, "does not follow the header: lines before it are missing")
            elif genuine:  # then the line before it is the one that is not as it was
                self._blame(base, "was changed: the next line holds another hash of it")
                self.chain.header_is_blamed |= base.record is None
            else:
                self._blame(line, "was changed: its hash and the one that it holds are both wrong")
                blamed = True
        steps = {record.step + 1}
        if blamed:
            steps |= {step + 1 for step in self._expected}
        if record.state_digest is not None:
            self.chain.states[record.step] = record.state_digest
        if self.chain.first_step is None:
            self.chain.first_step = record.step
        step = min(self._expected, default=record.step) if blamed else record.step
        self.chain.last_step = max(step, self.chain.last_step or 0)
        self._go_on(line, blamed=blamed, steps=steps)

    def _is_sealed(self, line: _Line) -> bool:
        """Of a last line: a seal names it, or there is no seal."""
        return not self._marks or line.hash in self._marks.values()

    def _out_of_order(self, step: int) -> str:
        expected = min(self._expected)
        if step < expected:
            return f"step {step} stands where step {expected} belongs"
        lost = f"step {expected} is" if step == expected + 1 else f"steps {expected} to {step - 1} are"
        return f"step {step} stands where step {expected} belongs: {lost} missing before it"

    def _go_on(self, line: _Line, *, blamed: bool, steps: set[int]) -> None:
        self._base, self._base_is_blamed, self._expected = line, blamed, steps

    def _blame(self, line: _Line, what: str) -> None:
        finding = line.finding(what)
        if finding.step is not None:
            self.chain.blamed_steps.add(finding.step)
        self._report(finding)

    def _report(self, finding: Finding) -> None:
        if len(self.chain.findings) < MAX_FINDINGS:
            self.chain.findings.append(finding)
