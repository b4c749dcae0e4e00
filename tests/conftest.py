"""Fixtures shared by all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from apertus_nemo.testing.ranks import Parent

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # of a shell's background jobs; every test and child would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def parent() -> Iterator[Parent]:
    """One process that has imported NeMo; forks the ranks of every case of the session."""
    with Parent(paths=[str(Path(__file__).resolve().parents[1])]) as running:
        yield running
