"""Whether a run goes on is the kernel's to say."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.launch.resume import claimed
from apertus_nemo.record.claim import is_claimed


def test_a_claim_is_seen_while_it_lasts_and_two_may_look(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed(folder):
        assert is_claimed(folder) is True
        assert is_claimed(folder) is True
    assert is_claimed(folder) is False
    with claimed(folder):  # looking has left nothing behind
        pass


def test_a_file_system_without_locks_and_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^could not read .*/none: No such file or directory$"):
        is_claimed(tmp_path / "none")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert is_claimed(tmp_path) is None
