"""When a run stops for its time limit; that ranks agree is held by tests/crash/test_start_again.py."""

from __future__ import annotations

import pytest

from apertus_nemo.testing.ranks import Parent


@pytest.mark.parametrize(
    ("limit_s", "durations", "stopped"),
    [
        (None, [1.0] * 50, None),
        (10.0, [1.0] * 50, 9),  # the tenth would end on the limit
        (10.5, [1.0] * 50, 10),
        (10.0, [4.0, 1.0, 1.0, 1.0], 3),  # another one might be as long as the first
        (10.0, [1.0, 1.0, [1.0, 3.0], 1.0, 1.0, 1.0], 4),  # at 7 s, and a checkpoint takes 3
        (10.0, [1.0, [1.0, 2.0], 1.0, 1.0, 1.0, 1.0, 1.0], 5),
        (-5.0, [1.0, 1.0], 1),  # the start took all of it: one step is done
    ],
)
def test_when(parent: Parent, limit_s: float | None, durations: list[float | list[float]], stopped: int | None) -> None:
    arguments = {"limit_s": limit_s, "durations": durations}
    assert parent.run("tests.cases.stopping:follow", arguments=arguments) == [stopped]
