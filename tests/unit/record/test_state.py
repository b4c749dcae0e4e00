"""The list of a state's tensors: bytes, digest, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.state import StateDigest, TensorDigest

A = TensorDigest("lm_head.weight", "weight", "float32", (4, 2), (1, 2, 3, 2**64 - 1))
B = TensorDigest("lm_head.weight", "exp_avg_slow", "float32", (4, 2), (5, 6, 7, 8))
C = TensorDigest("model.norm.weight", "weight", "bfloat16", (2,), (0, 0, 0, 0))


def test_the_digest_is_that_of_the_sorted_list() -> None:
    state = StateDigest.of(3, [C, A, B])
    assert state.tensors == (B, A, C)
    word = "000000000000000{}".format
    listed = [
        ["lm_head.weight", "exp_avg_slow", "float32", [4, 2], [word(n) for n in (5, 6, 7, 8)]],
        ["lm_head.weight", "weight", "float32", [4, 2], [word(1), word(2), word(3), "f" * 16]],
        ["model.norm.weight", "weight", "bfloat16", [2], [word(0)] * 4],
    ]
    digest = hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()
    assert state.digest == digest
    assert json.loads(state.to_bytes()) == {"digest": digest, "format": 1, "step": 3, "tensors": listed}
    weights = hashlib.sha256(json.dumps(listed[1:], separators=(",", ":")).encode()).hexdigest()
    assert state.digest_of_kind("weight") == weights
    assert StateDigest.from_bytes(state.to_bytes(), what="it") == state


@pytest.mark.parametrize(
    "other",
    [
        replace(A, name="lm_head.Weight"),
        replace(A, kind="master"),
        replace(A, dtype="float16"),
        replace(A, shape=(2, 4)),
        replace(A, lanes=(1, 2, 3, 2**64 - 2)),
        replace(A, lanes=(2, 1, 3, 2**64 - 1)),
    ],
)
def test_the_digest_binds_every_part(other: TensorDigest) -> None:
    assert StateDigest.of(0, [other, B]).digest != StateDigest.of(0, [A, B]).digest


def test_a_tensor_stands_once() -> None:
    with pytest.raises(ApertusError, match=r"lm_head.weight \(weight\) stands twice in the state of step 7"):
        StateDigest.of(7, [A, replace(A, lanes=(0, 0, 0, 0))])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "has format 2; this version reads 1"),
        ({"step": -1}, "is not the digest of a state"),
        ({"more": 1}, "is not the digest of a state"),
        ({"digest": "0" * 64}, "says state digest 0000"),
        ({"tensors": [A.to_list()]}, "says state digest "),
        ({"tensors": [A.to_list(), B.to_list()]}, "are not sorted"),
        ({"tensors": [A.to_list(), A.to_list()]}, "stands twice"),
        ({"tensors": [A.to_list()[:4]]}, "a tensor is a list of"),
        ({"tensors": [[1, *A.to_list()[1:]]]}, "the name 1 is not a string"),
        ({"tensors": [["w", "momentum", *A.to_list()[2:]]]}, "w: kind 'momentum' is none of weight, master, "),
        ({"tensors": [["w", "weight", "float64", [1], A.to_list()[4]]]}, "w: dtype 'float64' is none of float32, "),
        ({"tensors": [["w", "weight", "float32", [True], A.to_list()[4]]]}, "w: shape [True] is not a list of sizes"),
        ({"tensors": [["w", "weight", "float32", [1], A.to_list()[4][:3]]]}, "w: there are not 4 lanes"),
        ({"tensors": [["w", "weight", "float32", [1], [1, 2, 3, 4]]]}, "w: 1 is not 16 lower-case hex digits"),
    ],
)
def test_files_of_another_form_are_described(change: dict[str, Any], words: str) -> None:
    tree = json.loads(StateDigest.of(0, [A, B]).to_bytes()) | change
    with pytest.raises(InputError) as caught:
        StateDigest.from_bytes(dumps(tree), what="states/step-000000000.json")
    assert str(caught.value).startswith("states/step-000000000.json: ")
    assert words in str(caught.value)
