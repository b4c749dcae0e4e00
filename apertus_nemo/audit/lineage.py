"""Where a model is from: its initial states, walked back from run to run, each link held against the records.

    chain = lineage(Path("runs/sft"), runs=[Path("runs")])
    chain.members, chain.links, chain.end, chain.exit_code

A lock names the run that its weights are from by that run's lock digest, which covers the name of the run before it: no
chain leads back into itself, and what the first lock names cannot be exchanged unseen. Runs are found by that digest.
Only records are read; what would take hashing weights is left to others, and said to be not checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.audit.lineage_checks import (
    DIFFERENT,
    EQUAL,
    NOT_CHECKED,
    Check,
    Origin,
    first_state,
    log_header,
    of_parent,
)
from apertus_nemo.audit.status import find_runs
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.record.canonical import is_digest, is_unknown, loads
from apertus_nemo.record.initial import EXPORTED, HUGGING_FACE, IMPORTED, MEGATRON, MERGED, RUN
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.places import read

BEGINNING = "beginning"  # weights are drawn from a seed
NOT_OURS = "not exported"  # a folder that does not say which run it is from
NOT_FOUND = "not found"  # the parent is not among the places that were looked at
UNREADABLE = "unreadable"  # the record does not say what the weights are from, or this version cannot read it
TOO_LONG = "too long"
CONTRADICTED = "contradicted"

MAX_LINKS = 64
_MAX_STEP = 10**9  # names of states have nine digits
_MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Member:
    """A run, or the exported folder that a chain begins with."""

    path: Path
    name: str | None = None  # of the recipe; None: a folder
    lock_digest: str | None = None


@dataclass(frozen=True)
class Link:
    """From a member to the run that its weights are from."""

    origin: Origin
    through: str  # "run": read from its checkpoint; else from a folder that was exported of it
    found: str | None  # where the run was found: "recorded path", "beside", "--runs"; None: it was not
    checks: list[Check]
    passed_over: list[tuple[Path, Check]] = field(default_factory=list)  # runs of that lock that do not fit, and why


@dataclass
class Lineage:
    """A chain, and where and why it ends; `links[i]` leads from `members[i]` to `members[i + 1]`, if that is there."""

    members: list[Member] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    end: str = ""
    reason: str = ""

    @property
    def exit_code(self) -> int:
        """1 where a link is contradicted, else 0: that an end is unknown is no fault of the record."""
        return 1 if self.end == CONTRADICTED else 0

    def ended(self, end: str, reason: str) -> Lineage:
        """The same, with its end."""
        self.end, self.reason = end, reason
        return self


def lineage(start: Path, *, runs: Sequence[Path] = (), max_links: int = MAX_LINKS) -> Lineage:
    """Walk back from a run directory or an exported folder; parents are also looked for in `runs`.

    Raises InputError where `start` is neither, where it cannot be read, or where one of `runs` is no folder.
    """
    search = _Search(find_runs(runs))
    if not os.path.isdir(start):
        raise InputError(f"{start} is not a folder: give a run directory, or a folder that was exported from one")
    chain = Lineage()
    if os.path.isfile(start / "lock.json"):
        lock = _read_lock(start)
        chain.members.append(_member(start, lock))
        step = _step_of_run(start, lock)
    else:
        chain.members.append(Member(start))
        step = _step_of_folder(start)
    while not isinstance(step, _End):
        if len(chain.links) == max_links:
            return chain.ended(TOO_LONG, f"more than {max_links} links are not followed")
        link, parent = search.parent(chain.members[-1].path, step)
        chain.links.append(link)
        wrong = next((check for check in link.checks if check.result == DIFFERENT), None)
        if parent is not None:
            chain.members.append(_member(*parent))
        if wrong is not None:
            return chain.ended(CONTRADICTED, f"{wrong.what}: {wrong.reason}")
        if parent is None:
            return chain.ended(
                NOT_FOUND,
                f"no run with the lock digest {step.origin.lock_digest} was found in {search.looked_at}; "
                "--runs DIR says where else to look",
            )
        try:
            step = _step_of_run(*parent)
        except InputError as error:
            return chain.ended(UNREADABLE, str(error))
    return chain.ended(step.end, step.reason)


@dataclass(frozen=True)
class _Step:
    """What a member says of the run before it."""

    origin: Origin
    through: str
    recorded: list[Path]  # where that run was when it was read; any path, from a record
    checks: list[Check]  # of the member itself


@dataclass(frozen=True)
class _End:
    end: str
    reason: str


class _Search:
    """The runs of a few folders, by lock digest; each lock is read once."""

    def __init__(self, given: list[Path]) -> None:
        self._given = given
        self._locks: dict[Path, RunLock | None] = {}
        self.looked_at = ""

    def parent(self, child: Path, step: _Step) -> tuple[Link, tuple[Path, RunLock] | None]:
        """The run that the weights are from: the first of those with its lock whose record fits, if one does."""
        best: tuple[int, str, Path, RunLock, list[Check]] | None = None
        exchanged: list[tuple[Path, Check]] = []
        unfit: list[tuple[Path, Check]] = []
        wanted = step.origin.lock_digest
        for found, path in self._places(child, step):
            lock = self._lock(path)
            if lock is None:
                continue
            if lock.digest != wanted:
                if log_header(path) == wanted:
                    text = (
                        f"the step log of {path} is of the run that is looked for, and its lock.json is another, "
                        f"of digest {lock.digest}: it was changed or exchanged"
                    )
                    exchanged.append((path, Check("lock digest", DIFFERENT, text)))
                continue
            checks = of_parent(path, step.origin)
            results = {check.result for check in checks}
            unfit += [(path, check) for check in checks if check.result == DIFFERENT]
            rank = 2 if DIFFERENT in results else 0 if checks[1].result == EQUAL else 1
            if best is None or rank < best[0]:
                best = (rank, found, path, lock, checks)
            if rank == 0:
                break
        if best is not None:
            _, found, path, lock, checks = best
            over = [(other, check) for other, check in exchanged + unfit if other != path]
            return Link(step.origin, step.through, found, [*checks, *step.checks], over), (path, lock)
        checks = [check for _, check in exchanged[:1]]
        return Link(step.origin, step.through, None, [*checks, *step.checks]), None

    def _places(self, child: Path, step: _Step) -> Iterator[tuple[str, Path]]:
        beside = (child if child.name not in ("", "..") else child.resolve()).parent
        names = [*map(str, step.recorded), f"{beside}", *(["what --runs names"] if self._given else [])]
        self.looked_at = ", ".join(names)
        seen: set[Path] = set()
        try:
            siblings = find_runs([beside])
        except InputError:
            siblings = []
        for found, paths in (("recorded path", step.recorded), ("beside", siblings), ("--runs", self._given)):
            for path in paths:
                place = _place(path)
                if place not in seen:
                    seen.add(place)
                    yield found, path

    def _lock(self, path: Path) -> RunLock | None:
        """Of the run in a folder; None where there is none that can be read."""
        place = _place(path)
        if place not in self._locks:
            try:
                self._locks[place] = _read_lock(path)
            except InputError:
                self._locks[place] = None
        return self._locks[place]


def _place(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path


def _member(path: Path, lock: RunLock) -> Member:
    config = lock.tree["config"]
    name = config.get("name") if isinstance(config, dict) else None
    return Member(path, name if isinstance(name, str) else "", lock.digest)


def _read_lock(folder: Path) -> RunLock:
    try:
        return RunLock.from_bytes(read(folder / "lock.json", max_bytes=_MAX_BYTES), what=str(folder / "lock.json"))
    except (OSError, ValueError) as error:  # a path from a record may be none at all
        raise InputError(f"could not read {folder}: {error}") from error


def _step_of_run(folder: Path, lock: RunLock) -> _Step | _End:
    """What a run's lock says of its first weights. Raises InputError where that is not in a form that we write."""
    logged = log_header(folder)
    if logged is not None and logged != lock.digest:
        return _End(
            CONTRADICTED,
            f"{folder}/lock.json has the digest {lock.digest}, and its step log is of a lock with {logged}: "
            "it was changed or exchanged",
        )
    state, config = lock.tree["initial_state"], lock.tree["config"]
    if not isinstance(state, dict) or not isinstance(config, dict):
        raise InputError(f"{folder}/lock.json does not say what the run starts from")
    if is_unknown(state):
        return _End(UNREADABLE, f"{folder}: what it starts from is unknown: {state['unknown']}")
    trainer: dict[str, Any] = config["trainer"] if isinstance(config.get("trainer"), dict) else {}
    kind = state.get("kind")
    if kind == "none":
        return _End(BEGINNING, f"{folder} draws its weights from the seed {trainer.get('seed')}")
    if kind not in (RUN, HUGGING_FACE, MEGATRON):
        raise InputError(f"{folder}/lock.json: this version knows no initial state of kind {kind!r}")
    parent = state.get("parent")
    path = _recorded(folder, config)
    if kind != RUN and isinstance(parent, dict) and is_unknown(parent):
        where = path[0] if path else "a folder that it does not name"
        return _End(NOT_OURS, f"{folder} starts from {where}: {parent['unknown']}")
    files = state.get("files") if kind == RUN else None
    origin = _origin(parent, state.get("weights_digest"), files, what=f"{folder}/lock.json: initial_state")
    widened = state.get("precision") != trainer.get("precision")
    return _Step(origin, kind, path, [first_state(folder, origin, widened=widened)])


def _step_of_folder(folder: Path) -> _Step | _End:
    """What the note of an exported folder says."""
    note = folder / EXPORTED
    if not os.path.isfile(note):
        if not os.path.isfile(folder / "config.json"):
            raise InputError(
                f"{folder} is neither a run directory nor a folder of a model: it holds no lock.json, no {EXPORTED} "
                "and no config.json"
            )
        return _End(NOT_OURS, f"{folder} holds no {EXPORTED}: it was not exported from a run of ours")
    tree = loads(read(note, max_bytes=_MAX_BYTES), what=str(note))
    source = tree.get("source") if isinstance(tree, dict) else None
    imported = isinstance(tree, dict) and tree.get("kind") == IMPORTED
    if (imported and source is None) or (isinstance(source, dict) and source.keys() == {"weights_digest"}):
        return _End(NOT_OURS, f"{folder}: the weights were imported from a folder that was not exported by us")
    if isinstance(tree, dict) and tree.get("kind") == MERGED and source is None:
        return _End(NOT_OURS, f"{folder}: the adapters that were merged were not exported by us")
    if not isinstance(source, dict):
        raise InputError(f"{note} does not say which run it was exported from")
    manifest = source.get("checkpoint_manifest_sha256")
    origin = _origin(source, source.get("weights_digest"), manifest, what=str(note))
    unread = Check("weights of the folder", NOT_CHECKED, "apertus-nemo convert digest computes their digest")
    return _Step(origin, HUGGING_FACE, [], [unread])


def _origin(parent: Any, weights: Any, files: Any, *, what: str) -> Origin:
    """Raises InputError, beginning with `what`, for anything that we do not write."""
    if not isinstance(parent, dict) or not is_digest(parent.get("lock_digest")):
        raise InputError(f"{what}: names no run by its lock digest")
    step = parent.get("step")
    if type(step) is not int or not 0 <= step < _MAX_STEP:
        raise InputError(f"{what}: names no step of that run")
    if weights is not None and not is_digest(weights) and not is_unknown(weights):
        raise InputError(f"{what}: the weights digest is no SHA-256")
    adapters = parent.get("adapter_digest")
    if adapters is not None and not is_digest(adapters):
        raise InputError(f"{what}: the adapter digest is no SHA-256")
    reason = weights["unknown"] if isinstance(weights, dict) else "nobody has logged it"
    known = weights if is_digest(weights) else None
    return Origin(parent["lock_digest"], step, known, reason, files, "adapter_digest" in parent, adapters)


def _recorded(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Where the weights were when the run was started: as its ranks were told, and as its recipe says."""
    found: list[Any] = []
    try:
        note = loads(read(folder / "attempts" / "000" / "environment.json", max_bytes=_MAX_BYTES), what="")
        found.append(note["APERTUS_INITIAL"])
    except (ApertusError, KeyError, TypeError):
        pass
    initial = config.get("initial")
    found.append(initial.get("path") if isinstance(initial, dict) else "")
    paths = [Path(os.path.expanduser(text)) for text in found if isinstance(text, str) and text and "\0" not in text]
    # The ranks read a checkpoint, RUN/checkpoints/step-N; the recipe names the run.
    runs = [path.parent.parent if path.parent.name == "checkpoints" else path for path in paths]
    return list(dict.fromkeys(runs))
