"""Which checkpoints a run has committed, and which of them it has pruned by its own policy: `checkpoints.json`.

    listed = read_list(run.path)                            # empty where there is none
    write_list(run.path, listed.begun(made))                # before the rename that commits
    write_list(run.path, listed.committed(made).pruned([3]))    # after it, and before anything is removed
    to_prune([3, 6, 9, 12], keep=2, every=6)                # (3,)

Every change is noted before it is made or right after it, in an order in which a crash leaves nothing that looks like
somebody's hand: a checkpoint that is listed, not pruned and not there was removed by somebody else. Each write is
atomic; `end.json` holds the SHA-256 of the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps, is_digest, loads_canonical, sha256_hex
from apertus_nemo.record.files import read_bytes, write_atomic

LIST = "checkpoints.json"
FORMAT = 1
KIND = "apertus-nemo checkpoints"
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Made:
    """One checkpoint that was committed, or is about to be."""

    step: int
    manifest: str  # SHA-256 of its manifest.json
    attempt: int | None  # that wrote it; None: one that is not known, of before there was a list
    pruned: bool = False  # the policy of the run removes it, or has done so

    def tree(self) -> dict[str, Any]:
        """As it stands in the list."""
        return {"attempt": self.attempt, "manifest": self.manifest, "pruned": self.pruned, "step": self.step}


@dataclass(frozen=True)
class CheckpointList:
    """`made` by step; `pending` is what was about to be committed when the list was written."""

    made: Mapping[int, Made] = field(default_factory=dict)
    pending: Made | None = None

    def begun(self, made: Made) -> CheckpointList:
        """`made` is about to be renamed into place."""
        return replace(self, pending=made)

    def committed(self, made: Made) -> CheckpointList:
        """`made` is in its place."""
        return CheckpointList({**self.made, made.step: made})

    def pruned(self, steps: Iterable[int]) -> CheckpointList:
        """The checkpoints of these steps are about to be removed by policy."""
        return replace(self, made={**self.made, **{step: replace(self.made[step], pruned=True) for step in steps}})

    def to_bytes(self) -> bytes:
        """Canonical JSON with the digest of its other fields."""
        body = {
            "checkpoints": [self.made[step].tree() for step in sorted(self.made)],
            "format": FORMAT,
            "kind": KIND,
            "pending": None if self.pending is None else self.pending.tree(),
        }
        return dumps({**body, "digest": sha256_hex(dumps(body))})

    @classmethod
    def from_bytes(cls, data: bytes, *, what: str) -> CheckpointList:
        """Read `checkpoints.json`; raises InputError, beginning with `what`."""
        tree = loads_canonical(data, what=what, max_bytes=MAX_BYTES)
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise InputError(f"{what}: is not a list of checkpoints")
        if tree.get("format") != FORMAT:
            raise InputError(f"{what}: has format {str(tree.get('format'))[:40]}; this version reads {FORMAT}")
        body = {key: value for key, value in tree.items() if key != "digest"}
        if tree.get("digest") != sha256_hex(dumps(body)):
            raise InputError(f"{what}: does not have the digest that it names: it was changed after it was written")
        entries = body.get("checkpoints")
        if set(body) != {"checkpoints", "format", "kind", "pending"} or not isinstance(entries, list):
            raise InputError(f"{what}: is not a list of checkpoints")
        made = [_made(entry, what) for entry in entries]
        if [item.step for item in made] != sorted({item.step for item in made}):
            raise InputError(f"{what}: is not a list of checkpoints")
        pending = None if body["pending"] is None else _made(body["pending"], what)
        return cls({item.step: item for item in made}, pending)


def _made(tree: object, what: str) -> Made:
    if (
        not isinstance(tree, dict)
        or set(tree) != {"attempt", "manifest", "pruned", "step"}
        or not (type(tree["step"]) is int and tree["step"] >= 0)
        or not (tree["attempt"] is None or (type(tree["attempt"]) is int and tree["attempt"] >= 0))
        or type(tree["pruned"]) is not bool
        or not is_digest(tree["manifest"])
    ):
        raise InputError(f"{what}: is not a list of checkpoints")
    return Made(tree["step"], tree["manifest"], tree["attempt"], tree["pruned"])


def read_list(folder: Path) -> CheckpointList:
    """The list of the run directory `folder`; empty where there is none. Raises InputError for one that was changed."""
    path = Path(folder) / LIST
    if not path.exists():
        return CheckpointList()
    return CheckpointList.from_bytes(read_bytes(path, max_bytes=MAX_BYTES), what=str(path))


def write_list(folder: Path, listed: CheckpointList) -> None:
    """Write `checkpoints.json`, over the one before. Raises UnfitEnvironment where the disk does not allow it."""
    write_atomic(Path(folder) / LIST, listed.to_bytes())


def to_prune(steps: Iterable[int], *, keep: int, every: int) -> tuple[int, ...]:
    """Of the steps that have a checkpoint, those whose checkpoint goes.

    The newest `keep` stay (0: all do), and every one whose step `every` divides (0: none for that reason).
    """
    ordered = sorted(steps)
    old = ordered[:-keep] if keep > 0 else []
    return tuple(step for step in old if every <= 0 or step % every)
