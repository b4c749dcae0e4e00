"""The state digest over real process groups: any cut gives the digests of the whole, and drift is named everywhere."""

from __future__ import annotations

import pytest

from apertus_nemo.record.state_digest import tensor_digest
from apertus_nemo.testing.ranks import Parent
from tests.cases import state_digest as case


@pytest.mark.parametrize(("world_size", "tp_size"), [(1, 1), (4, 2)])
def test_every_rank_collects_the_digests_of_the_whole(parent: Parent, world_size: int, tp_size: int) -> None:
    expected = {
        f"{name} {kind}": tensor_digest(name, kind, array).to_list()
        for kind in case.KINDS
        for name, array in case.published(kind).items()
    }
    arguments = {"tp_size": tp_size}
    results = parent.run("tests.cases.state_digest:collected", world_size=world_size, arguments=arguments)
    assert results == [expected] * world_size


def test_a_replica_that_drifted_is_named_on_every_rank(parent: Parent) -> None:
    arguments = {"tp_size": 2, "drift_on": 3}
    results = parent.run("tests.cases.state_digest:collected", world_size=4, arguments=arguments)
    message = (
        "model.norm.weight (weight): ranks 0 and 3 hold different bits of the same block, rows 0 to 0, "
        "columns 0 to 15: replicas have drifted apart"
    )
    assert results == [{"differs": message}] * 4
