"""The forking parent: results by rank, and no case outlives its time limit."""

from __future__ import annotations

import time

import pytest

from apertus_nemo.testing.ranks import Parent, RankFailed


def test_results_come_back_by_rank(parent: Parent) -> None:
    assert parent.run("tests.cases.hello:echo", world_size=2, arguments={"word": "a"}) == [[0, 2, "a"], [1, 2, "a"]]


def test_a_hung_rank_fails_the_case(parent: Parent) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"not done after 1.0 s; waiting for ranks \[1\]"):
        parent.run("tests.cases.hello:hang", world_size=2, timeout_s=1.0)
    assert time.monotonic() - start < 30


def test_a_killed_rank_ends_the_case_at_once(parent: Parent) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 ended with status -9"):
        parent.run("tests.cases.hello:die", world_size=2, timeout_s=100.0)
    assert time.monotonic() - start < 50
