"""Whatever is changed in a finished record is found, and at the right place.

A case is drawn by its number: one harm (an edit, a drop, an insertion, a swap, a duplication, a truncation) to the step
log, or to any other file that a digest covers. What a harm is and where it must be found is known to this file alone.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from apertus_nemo.audit.verification import Verification
from apertus_nemo.audit.verify import verify
from tests.unit.audit.sealed import SEGMENT_LINES, make_sealed

LOG = 22  # lines of the log: header, step 0, steps 1 to 20


@dataclass
class Harm:
    """What was done, and where it must be found: (file, line or None)."""

    what: str
    first: tuple[str, int | None]
    files: set[str]  # findings name no other file
    step: int | None = None


class Record:
    """A record on disk that is harmed and healed; only what a case touches is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
        self._touched: set[str] = set()

    def write(self, name: str, data: bytes | None) -> None:
        """Put other bytes in a file; None: remove it."""
        self._touched.add(name)
        if data is None:
            (self.path / name).unlink()
        else:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(data)

    def heal(self) -> None:
        """As it was."""
        for name in self._touched:
            if name in self.files:
                self.write(name, self.files[name])
            elif (self.path / name).exists():
                (self.path / name).unlink()
                if not any((parent := (self.path / name).parent).iterdir()):
                    parent.rmdir()
        self._touched.clear()

    def lines(self) -> list[bytes]:
        """All lines of the log, without newlines."""
        return [
            line for name in sorted(self.files) if name.startswith("steps/") for line in self.files[name].splitlines()
        ]

    def write_lines(self, lines: list[bytes], *, torn: int = 0) -> None:
        """Write a log of these lines, in as many segments as they take; `torn`: bytes cut off the end."""
        for number in range(0, max(LOG, len(lines)) // SEGMENT_LINES + 1):
            part = lines[number * SEGMENT_LINES : (number + 1) * SEGMENT_LINES]
            data = b"".join(line + b"\n" for line in part)
            last = (number + 1) * SEGMENT_LINES >= len(lines)
            name = f"steps/{number:06d}.jsonl"
            if part:
                self.write(name, data[: len(data) - torn] if last else data)
            elif name in self.files:
                self.write(name, None)


def at(line: int) -> tuple[str, int]:
    """Place of a line that is counted from 0."""
    return f"steps/{line // SEGMENT_LINES:06d}.jsonl", line % SEGMENT_LINES + 1


def changed_byte(rng: random.Random, data: bytes) -> bytes:
    """One byte replaced by another, inserted, or removed; never the same bytes."""
    position = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:position] + data[position + 1 :]
    if kind == 1:
        return data[:position] + bytes([rng.randrange(256)]) + data[position:]
    new = data[position] ^ (1 << rng.randrange(8)) if kind == 2 else rng.choice(b'0123456789abcdef"{}:,nul.-+')
    if new == data[position]:
        new ^= 1
    return data[:position] + bytes([new]) + data[position + 1 :]


def changed_line(rng: random.Random, line: bytes) -> bytes:
    """As `changed_byte`, and no newline comes in; or a value replaced so that the line stays well formed."""
    if rng.random() < 0.5 and b'"step":' in line:
        tail = int(line[line.rindex(b":") + 1 : -1])
        choices = [
            (b'"loss":"0x1.', b'"loss":"0x0.'),
            (b'"consumed_samples":', b'"consumed_samples":9'),
            (f'"step":{tail}}}'.encode(), f'"step":{tail + rng.choice((1, 2, 90))}}}'.encode()),
            (b'"previous":"', b'"previous":"' + b"0" * 64 + b'","x":"'),
        ]
        old, new = rng.choice(choices)
        if old.startswith(b'"previous"'):
            start = line.index(old) + len(old)
            flipped = bytes([line[start] ^ 1 if chr(line[start] ^ 1) in "0123456789abcdef" else line[start] ^ 3])
            return line[:start] + (flipped if chr(flipped[0]) in "0123456789abcdef" else b"0") + line[start + 1 :]
        if old in line and line.replace(old, new) != line:
            return line.replace(old, new)
    while b"\n" in (new := changed_byte(rng, line)) or new == line:
        pass
    return new


def log_edit(rng: random.Random, record: Record) -> Harm:
    lines = record.lines()
    index = rng.randrange(len(lines))
    before = lines[index]
    while lines[index] == before:
        lines[index] = changed_line(rng, before)
    record.write_lines(lines)
    return Harm(f"edit of line {index}", at(index), {at(index)[0]})


def log_drop(rng: random.Random, record: Record) -> Harm:
    lines = record.lines()
    start = rng.randrange(len(lines))
    stop = min(len(lines), start + rng.choice((1, 1, 2, 5)))
    if start == 0 and stop == len(lines):
        stop -= 1
    del lines[start:stop]
    record.write_lines(lines)
    return Harm(f"drop of lines {start} to {stop - 1}", at(start), all_segments())


def log_insert(rng: random.Random, record: Record) -> Harm:
    lines = record.lines()
    index = rng.randrange(len(lines) + 1)
    line = rng.choice([b"", b"{}", b"\xff\x00", b"[" * 200, changed_line(rng, rng.choice(lines))])
    lines.insert(index, line)
    record.write_lines(lines)
    return Harm(f"insertion of {line[:40]!r} at {index}", at(index), all_segments())


def log_duplicate(rng: random.Random, record: Record) -> Harm:
    lines = record.lines()
    source, index = rng.randrange(len(lines)), rng.randrange(1, len(lines) + 1)
    if rng.random() < 0.3:
        index = source + 1
    if index == source:  # a copy before the line itself is a copy after it
        index = source + 1
    lines.insert(index, lines[source])
    record.write_lines(lines)
    return Harm(f"line {source} again at {index}", at(index), all_segments())


def log_swap(rng: random.Random, record: Record) -> Harm:
    lines = record.lines()
    first, second = sorted(rng.sample(range(len(lines)), 2))
    lines[first], lines[second] = lines[second], lines[first]
    record.write_lines(lines)
    return Harm(f"swap of lines {first} and {second}", at(first), all_segments())


def log_truncation(rng: random.Random, record: Record) -> Harm:
    lines = record.lines()
    kept = rng.randrange(1, len(lines) + 1)
    torn = rng.randrange(1, len(lines[kept - 1]) + 1)
    record.write_lines(lines[:kept], torn=torn)
    return Harm(f"{torn} bytes cut off line {kept - 1}", at(kept - 1), all_segments())


def log_cut(rng: random.Random, record: Record) -> Harm:
    kept = rng.randrange(1, LOG)
    record.write_lines(record.lines()[:kept])
    return Harm(f"{LOG - kept} lines cut off the end", at(kept), all_segments())


def segment_drop(rng: random.Random, record: Record) -> Harm:
    name = rng.choice([name for name in record.files if name.startswith("steps/")])
    record.write(name, None)
    return Harm(f"drop of {name}", (name, 1 if name == "steps/000002.jsonl" else None), all_segments())


def segment_swap(rng: random.Random, record: Record) -> Harm:
    one, other = sorted(rng.sample([name for name in record.files if name.startswith("steps/")], 2))
    record.write(one, record.files[other])
    record.write(other, record.files[one])
    return Harm(f"swap of {one} and {other}", (one, 1), all_segments())


def all_segments() -> set[str]:
    return {f"steps/{number:06d}.jsonl" for number in range(4)}


def covered(record: Record) -> list[str]:
    """Files that a digest covers, but the log and the seals of attempts."""
    return [n for n in record.files if not n.startswith("steps/") and not n.endswith(".log")]


def file_edit(rng: random.Random, record: Record) -> Harm:
    name = rng.choice(covered(record))
    data = record.files[name]
    while data == record.files[name]:
        data = changed_byte(rng, data)
    record.write(name, data)
    return Harm(f"edit of {name}", (name, None), {name})


def file_truncation(rng: random.Random, record: Record) -> Harm:
    name = rng.choice(covered(record))
    record.write(name, record.files[name][: rng.randrange(len(record.files[name]))])
    return Harm(f"truncation of {name}", (name, None), {name})


def file_drop(rng: random.Random, record: Record) -> Harm:
    name = rng.choice([name for name in covered(record) if name != "attempts/001/seal.json"])  # see the next test
    record.write(name, None)
    return Harm(f"drop of {name}", (name, None), {name})


def file_swap(rng: random.Random, record: Record) -> Harm:
    names = covered(record)
    one, other = rng.sample(names, 2)
    record.write(one, record.files[other])
    record.write(other, record.files[one])
    # A file is not judged by an end.json, or by its checkpoint's manifest, that is none any more.
    judge = next((name for name in (one, other) if name.endswith(("end.json", "manifest.json"))), one)
    return Harm(f"swap of {one} and {other}", (judge, None), {one, other})


def file_insertion(rng: random.Random, record: Record) -> Harm:
    name = rng.choice(
        [
            f"checkpoints/step-0000000{rng.choice((10, 20))}/weights/__9_{rng.randrange(99)}.distcp",
            f"states/step-0000000{rng.randrange(21, 99)}.json",
            f"states/step-00000000{rng.randrange(1, 10)}.json",
            f"states/notes-{rng.randrange(99)}.txt",
            f"steps/00000{rng.randrange(10)}.jsonl.bak",
            "checkpoints/step-000000015/manifest.json",
        ]
    )
    record.write(name, rng.choice(list(record.files.values())))
    return Harm(f"insertion of {name}", (name, None), {name})


HARMS: list[Callable[[random.Random, Record], Harm]] = [
    log_edit,
    log_drop,
    log_insert,
    log_duplicate,
    log_swap,
    log_truncation,
    log_cut,
    segment_drop,
    segment_swap,
    file_edit,
    file_truncation,
    file_drop,
    file_swap,
    file_insertion,
]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    path = make_sealed(tmp_path_factory.mktemp("tampering") / "run")
    yield Record(path)
    shutil.rmtree(path)


def check(number: int, record: Record) -> None:
    rng = random.Random(number)
    harm = HARMS[number % len(HARMS)](rng, record)
    try:
        result = verify(record.path, segment_lines=SEGMENT_LINES)
    finally:
        record.heal()
    where = f"case {number}, {harm.what}: {[(f.place, f.what) for f in result.findings[:6]]}"
    assert result.exit_code == 1, where
    assert located(result, harm), where
    assert {finding.file for finding in result.findings} <= harm.files, where


def located(result: Verification, harm: Harm) -> bool:
    """The first finding is the harm's place; where two files were exchanged, either comes first."""
    file, line = harm.first
    first = result.findings[0]
    if line is None:
        return first.file in harm.files and file in {finding.file for finding in result.findings}
    return (first.file, first.line) == (file, line)


def test_the_record_is_whole_before(record: Record) -> None:
    result = verify(record.path, segment_lines=SEGMENT_LINES)
    assert (result.findings, result.finished, result.lines) == ([], True, LOG)


def test_every_harm_is_found_where_it_was_done(record: Record) -> None:
    for number in range(600):
        check(number, record)
    assert verify(record.path, segment_lines=SEGMENT_LINES).findings == []


def test_a_last_seal_that_is_missing_is_told(record: Record) -> None:
    """A crash between `end.json` and the seal leaves this, so that it is no finding."""
    record.write("attempts/001/seal.json", None)
    result = verify(record.path, segment_lines=SEGMENT_LINES)
    record.heal()
    assert (result.findings, result.finished) == ([], True)
    assert any(item.startswith("attempts/001/seal.json: is not here") for item in result.not_checked)


@pytest.mark.full
def test_ten_thousand_harms_are_found_where_they_were_done(record: Record) -> None:
    for number in range(10_000):
        check(number, record)
