"""The launcher's own care, apart from ranks: a signal that comes while a rank is started."""

from __future__ import annotations

import signal

import pytest

from apertus_nemo.launch.account import signals_held


class Heard(Exception):
    """The handler ran."""


def start(done: list[str], number: signal.Signals) -> None:
    """What is held together: the signal comes in the middle of it."""
    with signals_held():
        signal.raise_signal(number)
        done.append(number.name)


def test_a_signal_waits_until_the_rank_is_in_the_list() -> None:
    def handler(number: int, _: object) -> None:
        raise Heard(number)

    before = signal.signal(signal.SIGTERM, handler)
    done: list[str] = []
    try:
        with pytest.raises(Heard, match=str(int(signal.SIGTERM))):
            start(done, signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(KeyboardInterrupt):
            start(done, signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == ["SIGTERM", "SIGINT"]
