"""Digests of logical tensors, and of a whole state; how they are written to `states/`.

    tensor = TensorDigest("lm_head.weight", "weight", "float32", (4096, 64), (lane0, lane1, lane2, lane3))
    state = StateDigest.of(10, [tensor, ...])
    state.digest                        # SHA-256 over the sorted list of tensors
    write_atomic(path, state.to_bytes())
    StateDigest.from_bytes(path.read_bytes(), what=str(path))

What the lanes are: docs/state-digest.md. Pure Python: reading a record needs neither numpy nor torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.record.canonical import dumps, from_hex_word, hex_word, loads_canonical, sha256_hex

FORMAT = 1  # of the state digest and of the file
LANES = 4
_OWN = re.compile(r"(?<=\.act_fn\.alpha_[pn])\.tp[1-9][0-9]*\Z")  # see model/layout.py
_ADAPTER = re.compile(r"\.lora_[AB]\.weight\Z")  # see model/adapter_layout.py
KINDS = ("weight", "master", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
ELEMENT_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}  # by dtype

Lanes = tuple[int, int, int, int]


@dataclass(frozen=True, order=True)
class TensorDigest:
    """One logical tensor: what it is, and its four lanes."""

    name: str  # published (Hugging Face) name
    kind: str  # one of KINDS
    dtype: str  # one of ELEMENT_BITS
    shape: tuple[int, ...]  # of the whole published tensor
    lanes: Lanes  # each in [0, 2^64)

    def to_list(self) -> list[Any]:
        """[name, kind, dtype, shape, lanes], as it stands in the file and under the hash."""
        return [self.name, self.kind, self.dtype, list(self.shape), [hex_word(lane) for lane in self.lanes]]

    @classmethod
    def from_list(cls, item: Any, *, what: str) -> TensorDigest:
        """The inverse of `to_list`; raises InputError, beginning with `what`, for anything else."""
        if not isinstance(item, list) or len(item) != 5:
            raise InputError(f"{what}: a tensor is a list of name, kind, dtype, shape and lanes")
        name, kind, dtype, shape, lanes = item
        if not isinstance(name, str):
            raise InputError(f"{what}: the name {name!r} is not a string")
        if kind not in KINDS:
            raise InputError(f"{what}: {name}: kind {kind!r} is none of {', '.join(KINDS)}")
        if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
            raise InputError(f"{what}: {name}: dtype {dtype!r} is none of {', '.join(ELEMENT_BITS)}")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise InputError(f"{what}: {name}: shape {shape!r} is not a list of sizes")
        if not isinstance(lanes, list) or len(lanes) != LANES:
            raise InputError(f"{what}: {name}: there are not {LANES} lanes")
        first, second, third, fourth = (from_hex_word(lane, what=f"{what}: {name}") for lane in lanes)
        return cls(name, kind, dtype, tuple(shape), (first, second, third, fourth))


@dataclass(frozen=True)
class StateDigest:
    """All logical tensors after a step (0: the initial state), sorted by name and kind."""

    step: int
    tensors: tuple[TensorDigest, ...]

    @classmethod
    def of(cls, step: int, tensors: Iterable[TensorDigest]) -> StateDigest:
        """Sorted; raises ApertusError where a tensor stands twice."""
        ordered = tuple(sorted(tensors))
        for before, after in itertools.pairwise(ordered):
            if (before.name, before.kind) == (after.name, after.kind):
                raise ApertusError(f"{after.name} ({after.kind}) stands twice in the state of step {step}")
        return cls(step, ordered)

    @cached_property
    def digest(self) -> str:
        """The state digest: SHA-256 over the canonical JSON of the tensors, 64 hex digits."""
        return digest_of(self.tensors)

    def digest_of_kind(self, kind: str) -> str:
        """The same over the published tensors of one kind: "weight" is what an exported checkpoint is held against.

        Adapters are no part of it.
        """
        found = [tensor for tensor in self.tensors if tensor.kind == kind]
        return digest_of([tensor for tensor in found if not is_own(tensor.name) and not is_adapter(tensor.name)])

    @property
    def adapter_digest(self) -> str | None:
        """The same over the matrices of adapters, which names exported adapters; None where there are none."""
        found = [tensor for tensor in self.tensors if tensor.kind == "weight" and is_adapter(tensor.name)]
        return digest_of(found) if found else None

    def to_bytes(self) -> bytes:
        """The file `states/step-NNNNNNNNN.json`: canonical JSON."""
        return dumps(
            {
                "digest": self.digest,
                "format": FORMAT,
                "step": self.step,
                "tensors": [tensor.to_list() for tensor in self.tensors],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, what: str) -> StateDigest:
        """Read the file; raises InputError where it is not one, or where its digest is not that of its tensors."""
        tree = loads_canonical(data, what=what)
        if not isinstance(tree, dict) or set(tree) != {"digest", "format", "step", "tensors"}:
            raise InputError(f"{what}: is not the digest of a state")
        if tree["format"] != FORMAT:
            raise InputError(f"{what}: has format {tree['format']!r}; this version reads {FORMAT}")
        if type(tree["step"]) is not int or tree["step"] < 0 or not isinstance(tree["tensors"], list):
            raise InputError(f"{what}: is not the digest of a state")
        tensors = [TensorDigest.from_list(item, what=what) for item in tree["tensors"]]
        try:
            state = cls.of(tree["step"], tensors)
        except ApertusError as error:
            raise InputError(f"{what}: {error}") from error
        if list(state.tensors) != tensors:
            raise InputError(f"{what}: the tensors are not sorted by name and kind")
        if state.digest != tree["digest"]:
            raise InputError(
                f"{what}: says state digest {tree['digest']}, but its tensors give {state.digest}: "
                "it was changed after it was written"
            )
        return state


def is_own(name: str) -> bool:
    """Whether a tensor is a tensor-parallel rank's own, beside the published one of its layer."""
    return published_name(name) != name


def is_adapter(name: str) -> bool:
    """Whether a tensor is a matrix of an adapter, beside the published ones."""
    return _ADAPTER.search(name) is not None


def published_name(name: str) -> str:
    """The published tensor that a rank's own stands beside: `...act_fn.alpha_p` of `...act_fn.alpha_p.tp3`."""
    return _OWN.sub("", name)


def digest_of(tensors: Iterable[TensorDigest]) -> str:
    """SHA-256 over the canonical JSON of the sorted list of `TensorDigest.to_list`."""
    return sha256_hex(dumps([tensor.to_list() for tensor in sorted(tensors)]))
