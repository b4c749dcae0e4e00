"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from apertus_nemo.testing.ranks import Parent


@pytest.fixture(scope="session")
def parent() -> Iterator[Parent]:
    """One process that has imported NeMo; forks the ranks of every case of the session."""
    with Parent(paths=[str(Path(__file__).resolve().parents[1])]) as running:
        yield running
