"""The step log: one canonical JSON line a step, each holding the SHA-256 of the line before it.

    header = StepLogHeader(lock_digest=..., run_id=new_run_id(), observation_digest=unknown("..."))
    with StepLogWriter.open(run.steps, header) as log:
        log.append(StepRecord(step=0, state_digest=...))         # the initial state
        log.append(StepRecord(step=1, consumed_samples=8, ..., loss=5.2))
        log.sync()                                               # at checkpoints
    for record in read_steps(run.steps): ...                     # verifies the chain

Line 0 of the log is the header; line n stands in segment n // 100,000 (`000000.jsonl`, ...). A line is
written in one `write`; what a crash leaves of a last line is dropped when the log is opened again. A step that is
executed again is compared with what was logged and not logged twice. Times and speeds are no part of
the chain: no two runs share them. Format: docs/run-directory.md.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from apertus_nemo.errors import ApertusError, Differs, InputError, UnfitEnvironment
from apertus_nemo.record.canonical import sha256_hex
from apertus_nemo.record.files import reading, sync_folder, write_all, writing
from apertus_nemo.record.places import AnyPath, names, open_binary
from apertus_nemo.record.seal import LogMark
from apertus_nemo.record.step_line import (
    MAX_LINE_BYTES,
    StepLogHeader,
    StepRecord,
    checked,
    new_run_id,
    parse_line,
    plain,
    show,
)

__all__ = ["StepLogHeader", "StepLogReader", "StepLogWriter", "StepRecord", "new_run_id", "read_steps"]

SEGMENT_LINES = 100_000

_SEGMENT = re.compile(r"[0-9]{6}\.jsonl\Z")


class StepLogReader:
    """Iterates over the records of a log and verifies the chain on the way.

    Raises InputError, with the place, for anything that the writer cannot have written: a line that does not hold
    the hash of the one before, a step out of order, a missing segment. A torn last line (a crash) is passed over
    and noted in `torn`. Lines cut off at the end of a log cannot be seen from the log alone.
    """

    def __init__(self, folder: AnyPath, *, segment_lines: int = SEGMENT_LINES) -> None:
        self.folder = folder
        self.torn: str | None = None  # where a torn last line stands; known once the iteration is done
        self.last: StepRecord | None = None
        self.lines = 0  # complete lines read so far, the header included
        self.hash = ""  # SHA-256 of the last complete line
        self._segment_lines = segment_lines
        self.segments = _segments(self.folder)
        self._stream = self._lines()
        first = next(self._stream, None)
        if first is None:
            raise InputError(f"{self.folder} holds no step log")
        self.header = StepLogHeader.from_line(first[1], what=first[0])

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """(place, line without newline) of every complete line."""
        for number, path in enumerate(self.segments):
            is_last = number == len(self.segments) - 1
            inside = 0
            with reading(path), open_binary(path) as stream:
                while line := stream.readline(MAX_LINE_BYTES + 1):
                    place = f"{path} line {inside + 1}"
                    if inside == self._segment_lines:
                        raise InputError(f"{place}: a segment has {self._segment_lines} lines and no more")
                    if line[-1:] != b"\n":
                        if len(line) > MAX_LINE_BYTES:
                            raise InputError(f"{place}: is longer than {MAX_LINE_BYTES} bytes")
                        if not is_last:
                            raise InputError(f"{place}: is torn, though a further segment follows")
                        self.torn = place
                        return
                    line = line[:-1]
                    self.hash = hashlib.sha256(line).hexdigest()
                    self.lines += 1
                    inside += 1
                    yield place, line
            if not is_last and inside != self._segment_lines:
                raise InputError(f"{path}: ends after {inside} of {self._segment_lines} lines: some were lost")

    def __iter__(self) -> Iterator[StepRecord]:
        before = self.hash
        for place, line in self._stream:
            record, previous = parse_line(line, what=place)
            if previous != before:
                raise InputError(
                    f"{place} (step {record.step}): does not hold the SHA-256 of the line before it: "
                    "the log was changed after it was written, or is damaged"
                )
            if self.last is not None and record.step != self.last.step + 1:
                raise InputError(f"{place}: step {record.step} follows step {self.last.step}")
            before = self.hash
            self.last = record
            yield record


def read_steps(folder: AnyPath) -> Iterator[StepRecord]:
    """The records of the log in `folder`; raises InputError with the place, also for a torn last line."""
    reader = StepLogReader(folder)
    yield from reader
    if reader.torn is not None:
        raise InputError(f"{reader.torn}: is torn: the run ended while writing it; resume the run")


def _segments(folder: AnyPath) -> list[AnyPath]:
    with reading(folder):
        found = sorted(name for name in names(folder) if _SEGMENT.match(name))
    for number, name in enumerate(found):
        if name != f"{number:06d}.jsonl":
            raise InputError(f"{folder}: segment {number:06d}.jsonl is missing")
    return [folder / name for name in found]


class StepLogWriter:
    """Appends to a log; made by `StepLogWriter.open`. One process writes a log at a time."""

    def __init__(self, folder: Path, *, segment_lines: int = SEGMENT_LINES) -> None:
        self.folder = folder
        self.header: StepLogHeader
        self.last_step: int | None = None  # last step logged
        self.repeated: list[int] = []  # steps that were executed again since the log was opened, and are equal
        self._segment_lines = segment_lines
        self._offsets = array("Q")  # where each line begins in its segment, header included
        self._first_step: int | None = None
        self._hash = ""
        self._end = 0  # bytes in the current segment
        self._descriptor = -1
        self._lock = -1

    @classmethod
    def open(cls, folder: Path, header: StepLogHeader, *, segment_lines: int = SEGMENT_LINES) -> StepLogWriter:
        """Create the log, or verify the one that is there, drop its torn last line, and continue it.

        A log that is there keeps its own header (run id, first observation); the lock digest must be the same.
        Raises InputError for another lock digest or a broken log, UnfitEnvironment where the disk does not allow
        it or where another process is writing the log.
        """
        log = cls(Path(folder), segment_lines=segment_lines)
        with writing(log.folder):
            log.folder.mkdir(parents=True, exist_ok=True)
            log._lock = os.open(log.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            log._take_lock()
            if not log._continue(header):
                log._begin(header)
        except BaseException:
            log._release()
            raise
        return log

    def append(self, record: StepRecord) -> bool:
        """Log the record; True if it was new, False if the step was logged before and is equal.

        Raises Differs, with step and value, where a repeated step is not equal. A state digest is
        compared where both have one. Raises UnfitEnvironment where the line cannot be written; the log is
        then as before.
        """
        record = checked(record)
        if self.last_step is not None and record.step <= self.last_step:
            self._compare(record)
            self.repeated.append(record.step)
            return False
        if self.last_step is not None and record.step != self.last_step + 1:
            raise ApertusError(f"step {record.step} cannot be logged after step {self.last_step}")
        self._write(record.to_line(self._hash))
        if self._first_step is None:
            self._first_step = record.step
        self.last_step = record.step
        return True

    def sync(self) -> None:
        """Make every line so far durable (fsync)."""
        with writing(self.folder):
            os.fsync(self._descriptor)

    def mark(self) -> LogMark:
        """How far the log goes, for a seal; call `sync` first."""
        return LogMark(
            header=sha256_hex(self.header.to_line()),
            lines=len(self._offsets),
            last_line=self._hash,
            last_step=self.last_step,
        )

    def close(self) -> None:
        """Sync and close; harmless when closed already."""
        if self._descriptor >= 0:
            try:
                self.sync()
            finally:
                self._release()

    def __enter__(self) -> StepLogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnfitEnvironment(f"{self.folder}: another process is writing this step log; end it first") from error
        except OSError:  # a file system without locks
            pass

    def _release(self) -> None:
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._lock = -1

    def _path(self, line: int) -> Path:
        return self.folder / f"{line // self._segment_lines:06d}.jsonl"

    def _begin(self, header: StepLogHeader) -> None:
        self.header = header
        self._write(header.to_line())
        self.sync()

    def _continue(self, header: StepLogHeader) -> bool:
        """Verify and take over what is there; False where there is no complete header."""
        segments = [self.folder / segment.name for segment in _segments(self.folder)]
        if not segments or (len(segments) == 1 and not _has_line(segments[0])):
            for path in segments:
                with writing(path):
                    os.truncate(path, 0)
            return False
        reader = StepLogReader(self.folder, segment_lines=self._segment_lines)
        self.header = reader.header
        if reader.header.lock_digest != header.lock_digest:
            raise InputError(
                f"{self.folder} was written under lock digest {reader.header.lock_digest}, not "
                f"{header.lock_digest}: choose another folder for this run"
            )
        for record in reader:
            if self._first_step is None:
                self._first_step = record.step
            self.last_step = record.step
        self._hash = reader.hash
        for path in segments:
            self._end = 0
            with reading(path), open(path, "rb") as stream:
                for line in stream:
                    if line.endswith(b"\n"):
                        self._offsets.append(self._end)
                        self._end += len(line)
        with writing(segments[-1]):
            self._descriptor = os.open(segments[-1], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.ftruncate(self._descriptor, self._end)
        return True

    def _write(self, line: bytes) -> None:
        """Append a line in one write; a part of it is taken back."""
        if len(line) >= MAX_LINE_BYTES:
            raise ApertusError(f"a line of {len(line)} bytes is longer than the step log takes")
        number = len(self._offsets)
        path = self._path(number)
        with writing(path):
            if number % self._segment_lines == 0:
                self._next_segment(path)
            data = line + b"\n"
            try:
                written = os.write(self._descriptor, data)
                if written != len(data):
                    write_all(self._descriptor, data[written:])
            except OSError:
                os.ftruncate(self._descriptor, self._end)
                raise
        self._offsets.append(self._end)
        self._end += len(data)
        self._hash = sha256_hex(line)

    def _next_segment(self, path: Path) -> None:
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, 0)
        self._end = 0
        sync_folder(self.folder)

    def _compare(self, record: StepRecord) -> None:
        """Hold a repeated step against what was logged; raises Differs."""
        assert self._first_step is not None
        if record.step < self._first_step:
            raise ApertusError(f"step {record.step} is before the first logged step, {self._first_step}")
        line = 1 + record.step - self._first_step
        path = self._path(line)
        with reading(path), open(path, "rb") as stream:
            stream.seek(self._offsets[line])
            text = stream.readline(MAX_LINE_BYTES)[:-1]
        logged, _ = parse_line(text, what=f"{path} (step {record.step})")
        old, new = logged.values(), record.values()
        for name in old:
            if name == "state_digest" and None in (old[name], new[name]):
                continue
            if plain(old[name]) != plain(new[name]):
                raise Differs(
                    f"step {record.step}: {name} is {show(new[name])}, but was {show(old[name])} when the step was "
                    f"first logged in {path}: the restart does not reproduce the run"
                )


def _has_line(path: Path) -> bool:
    with reading(path), open(path, "rb") as stream:
        return stream.readline(MAX_LINE_BYTES).endswith(b"\n")
