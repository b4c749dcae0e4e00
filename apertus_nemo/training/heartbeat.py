"""A rank's sign of life, in memory that it shares with its launcher.

    Heart.listen()                                   # SIGUSR1: the stacks of all threads, to standard error
    heart = Heart.from_environment(os.environ)       # beats for nobody where no launcher listens
    heart.beat(STEP, 7)                              # at step 7
    heart.beat()                                     # where it was, and a bit further

A beat is a few bytes in a slot of 64, written by the thread that trains: no call of the system's, no thread that would
go on while training hangs, nothing in the record. launch/heartbeat.py reads the slots and says who hangs.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
from collections.abc import Mapping

# Phases, in order. In all but STEP a rank may be silent for longer.
STARTING, BUILDING, FIRST_STEP, STEP, SAVING, ENDING = range(6)

SLOT = struct.Struct("=QqQ")  # beats so far, step (-1: none), phase
SLOT_BYTES = 64  # one cache line a rank
STACKS = signal.SIGUSR1


class Heart:
    """Beats into one slot; to nowhere without one."""

    def __init__(self, memory: mmap.mmap | None = None, slot: int = 0) -> None:
        self._memory, self._offset = memory, slot * SLOT_BYTES
        self._beats, self._step, self._phase = 0, -1, STARTING

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Heart:
        """The slot of LOCAL_RANK in the memory that APERTUS_HEARTBEAT_FD names, or none."""
        value = environment.get("APERTUS_HEARTBEAT_FD")
        if not value:
            return cls()
        descriptor = int(value)
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        os.close(descriptor)
        return cls(memory, int(environment["LOCAL_RANK"]))

    @staticmethod
    def listen() -> None:
        """Print every thread's stack when the launcher asks, even from inside a call that does not return."""
        faulthandler.register(STACKS, all_threads=True, chain=False)

    def beat(self, phase: int | None = None, step: int | None = None) -> None:
        """Say that this rank goes on; what is not given is as it was."""
        if phase is not None:
            self._phase = phase
        if step is not None:
            self._step = step
        self._beats += 1
        if self._memory is not None:
            SLOT.pack_into(self._memory, self._offset, self._beats, self._step, self._phase)
