"""Finds a rank that hangs: by the beats that ranks leave in shared memory (training/heartbeat.py).

    board = Board(ranks=2)                            # its descriptor goes to the ranks
    watch = Watch(board, timeout_s=300.0)
    watch.quiet(now, alive=[0, 1])                    # seconds without any beat, where that is too long; else None
    hang = examine(board, pids, logs, alive=[0, 1])   # stacks into the logs; which rank it is, and where it stands

Ranks wait for each other in every step, so when one hangs, all fall silent: a run hangs when no rank beats. Which rank
it was: one whose process is stopped, or whose stack cannot be had; else one whose stack waits for no other rank; else
the one that has come least far.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.record.places import printable
from apertus_nemo.training.heartbeat import (
    BUILDING,
    ENDING,
    FIRST_STEP,
    SAVING,
    SLOT,
    SLOT_BYTES,
    STACKS,
    STARTING,
    STEP,
)

# Start-up, the first step (memory, kernels, connections) and checkpoints take longer than a step of their own kind.
ALLOWANCE = 6.0  # times the timeout
_TIMES_LONGEST = 4.0  # a step may take so many times the longest silence so far in a step
_JUMP_S = 5.0  # the launcher itself was held up: what it did not see is no silence
_STACK_WAIT_S = 3.0
_MAX_STACK_BYTES = 2**18

_CURRENT = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>[0-9]+) in (?P<function>.+)$', re.MULTILINE)
# Where a rank waits for others, not for itself.
_WAITING = re.compile(r"torch/distributed/|torch/_C/_distributed|megatron/core/pipeline_parallel/p2p_communication")
_STATES = {"T": "is stopped", "t": "is held by a debugger", "D": "waits for a disk or a network", "Z": "is gone"}


@dataclass(frozen=True)
class Beat:
    """What a slot holds."""

    beats: int
    step: int | None
    phase: int

    @property
    def place(self) -> str:
        """Where the rank was, for people."""
        step = self.step
        if self.phase in (FIRST_STEP, STEP) and step is not None:
            return f"in step {step}"
        if self.phase == SAVING:
            return f"while saving step {step}" if step else "while digesting the initial state"
        return {STARTING: "while starting", BUILDING: "while building model and data"}.get(self.phase, "at the end")


class Board:
    """The memory with one slot a rank."""

    def __init__(self, ranks: int) -> None:
        self.descriptor = os.memfd_create("apertus-heartbeat")
        os.ftruncate(self.descriptor, ranks * SLOT_BYTES)
        self._memory = mmap.mmap(self.descriptor, ranks * SLOT_BYTES)

    def read(self, rank: int) -> Beat:
        """The last beat of a rank."""
        beats, step, phase = SLOT.unpack_from(self._memory, rank * SLOT_BYTES)
        return Beat(beats, None if step < 0 or not beats else step, min(phase, ENDING))

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.descriptor)


class Watch:
    """When the last beat of any rank was; `timeout_s` 0 watches without a limit."""

    def __init__(self, board: Board, *, timeout_s: float, now: float) -> None:
        self._board, self._timeout_s = board, timeout_s
        self._seen: dict[int, int] = {}
        self._last = self._looked = now
        self._longest = 0.0  # silence between two beats of a step

    def silence(self, now: float, alive: Iterable[int]) -> float:
        """Seconds since a beat of any rank."""
        ranks = list(alive)
        beats = {rank: self._board.read(rank) for rank in ranks}
        counts = {rank: beat.beats for rank, beat in beats.items()}
        if now - self._looked > _JUMP_S:
            self._last = now
        elif any(self._seen.get(rank, 0) != count for rank, count in counts.items()):
            if beats and all(beat.phase == STEP for beat in beats.values()):
                self._longest = max(self._longest, now - self._last)
            self._last = now
        self._seen.update(counts)
        self._looked = now
        return now - self._last

    def limit(self, alive: Iterable[int]) -> float:
        """Seconds that the ranks may be silent, as they stand."""
        if not self._timeout_s:
            return float("inf")
        in_step = all(self._board.read(rank).phase == STEP for rank in alive)
        return max(self._timeout_s, _TIMES_LONGEST * self._longest) if in_step else ALLOWANCE * self._timeout_s

    def quiet(self, now: float, alive: Sequence[int]) -> float | None:
        """The silence where it is longer than it may be."""
        silence = self.silence(now, alive)
        return silence if alive and silence > self.limit(alive) else None


@dataclass(frozen=True)
class Hang:
    """A rank that hangs, and what is known of where."""

    rank: int
    place: str  # "in step 7"
    where: str  # "is at sleep (cases.py line 12)", or why that cannot be known


@dataclass(frozen=True)
class _Seen:
    state: str  # of the process, as /proc has it
    frames: list[tuple[str, str, str]]  # file, line and function of the thread that trains, innermost first


def examine(board: Board, pids: Sequence[int], logs: Sequence[Path], *, alive: Sequence[int]) -> Hang:
    """Have every rank in `alive` print its stacks into its log, and tell which one the others wait for."""
    sizes = {rank: _size(logs[rank]) for rank in alive}
    for rank in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], STACKS)
    deadline = time.monotonic() + _STACK_WAIT_S
    stacks = dict.fromkeys(alive, "")
    while time.monotonic() < deadline and not all(map(_whole, stacks.values())):
        time.sleep(0.1)
        stacks = {rank: _tail(logs[rank], sizes[rank]) for rank in alive}
    seen = {rank: _Seen(_state(pids[rank]), _frames(stacks[rank])) for rank in alive}
    rank = min(alive, key=lambda rank: (*_guilt(seen[rank]), board.read(rank).beats, rank))
    return Hang(rank, board.read(rank).place, _where(seen[rank]))


def _guilt(seen: _Seen) -> tuple[bool, bool, bool]:
    """Sorts first: stopped, then without a stack, then at a place that waits for no other rank."""
    return seen.state not in ("T", "t", "D"), bool(seen.frames), _waits(seen)


def _waits(seen: _Seen) -> bool:
    return any(_WAITING.search(file) for file, _, _ in seen.frames[:8])


def _where(seen: _Seen) -> str:
    if not seen.frames:
        why = _STATES.get(seen.state, "did not answer")
        return f"its process {why}, so its stack cannot be had"
    file, line, function = seen.frames[0]
    waits = ", waiting for other ranks" if _waits(seen) else ""
    return printable(f"it is in {function} ({Path(file).name} line {line}){waits}")


def _frames(text: str) -> list[tuple[str, str, str]]:
    """Of the thread that took the signal (the main one); of the last one, which is the oldest, where none says so."""
    starts = list(_CURRENT.finditer(text))
    if not starts:
        return []
    chosen = next((s for s in starts if s.group().startswith("Current")), starts[-1])
    end = next((s.start() for s in starts if s.start() > chosen.start()), len(text))
    return [(m["file"], m["line"], m["function"]) for m in _FRAME.finditer(text, chosen.end(), end)]


def _whole(text: str) -> bool:
    return "Current thread" in text and text.endswith("\n")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _tail(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(_MAX_STACK_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "Z"
