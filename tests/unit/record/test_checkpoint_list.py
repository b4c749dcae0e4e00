"""The list of checkpoints: what a policy removes, and that a changed list is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.record.checkpoint_list import CheckpointList, Made, read_list, to_prune, write_list

A, B = Made(10, "a" * 64, 0), Made(20, "b" * 64, 1)


@pytest.mark.parametrize(
    ("keep", "every", "gone"),
    [
        (0, 0, ()),
        (0, 20, ()),
        (1, 0, (10, 20, 30, 35)),
        (2, 0, (10, 20, 30)),
        (2, 20, (10, 30)),
        (1, 10, (35,)),
        (5, 0, ()),
        (9, 0, ()),
    ],
)
def test_what_a_policy_removes(keep: int, every: int, gone: tuple[int, ...]) -> None:
    assert to_prune([35, 10, 40, 30, 20], keep=keep, every=every) == gone
    assert to_prune([], keep=keep, every=every) == ()


def test_the_newest_is_never_removed() -> None:
    for keep in range(1, 4):
        for every in range(4):
            for newest in range(1, 8):
                assert newest not in to_prune(range(1, newest + 1), keep=keep, every=every)


def test_a_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_list(tmp_path) == CheckpointList()
    listed = CheckpointList().begun(A)
    for each in (listed, listed.committed(A), listed.committed(A).begun(B), listed.committed(B).committed(A)):
        write_list(tmp_path, each)
        assert read_list(tmp_path) == each
    pruned = listed.committed(A).committed(B).pruned([10])
    assert [(made.step, made.pruned) for made in pruned.made.values()] == [(10, True), (20, False)]
    assert pruned.committed(A).made[10] == A, "one that was made again is there again"
    write_list(tmp_path, pruned)
    tree = json.loads((tmp_path / "checkpoints.json").read_bytes())
    body = {key: value for key, value in tree.items() if key != "digest"}
    assert tree["digest"] == hashlib.sha256(canonical(body)).hexdigest()


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "other"}, "is not a list of checkpoints"),
        ({"format": 2}, "has format 2; this version reads 1"),
        ({"more": 1}, "is not a list of checkpoints"),
        ({"checkpoints": {}}, "is not a list of checkpoints"),
        ({"checkpoints": [B.tree(), A.tree()]}, "is not a list of checkpoints"),
        ({"checkpoints": [A.tree(), A.tree()]}, "is not a list of checkpoints"),
        ({"pending": {**A.tree(), "step": -1}}, "is not a list of checkpoints"),
        ({"pending": {**A.tree(), "step": True}}, "is not a list of checkpoints"),
        ({"pending": {**A.tree(), "pruned": 0}}, "is not a list of checkpoints"),
        ({"pending": {**A.tree(), "manifest": "a"}}, "is not a list of checkpoints"),
        ({"pending": {**A.tree(), "attempt": "0"}}, "is not a list of checkpoints"),
        ({"pending": {**A.tree(), "x": 1}}, "is not a list of checkpoints"),
    ],
)
def test_what_is_no_list_is_refused(change: dict[str, Any], reason: str) -> None:
    tree = json.loads(CheckpointList().committed(A).to_bytes())
    changed = {**tree, **change}
    with pytest.raises(InputError, match=r"^it: does not have the digest|^it: is not a list|^it: has format"):
        CheckpointList.from_bytes(canonical(changed), what="it")
    body = {key: value for key, value in changed.items() if key != "digest"}
    data = canonical({**body, "digest": hashlib.sha256(canonical(body)).hexdigest()})
    with pytest.raises(InputError) as caught:
        CheckpointList.from_bytes(data, what="it")
    assert str(caught.value) == f"it: {reason}"
