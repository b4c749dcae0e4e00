"""Run a recorded run again, from its record alone, and compare; or say which pinned thing is not as it was.

    again = prepare(Path("runs/a"), cache=cache, shell=os.environ)     # reads the record, looks around
    again.differences                                                  # what is not as the lock says
    again.start(Path("runs/b"), allow=[], ...)                         # raises Refused, or trains

The lock says everything that a run is: its recipe is taken from there, and the code from the archive beside it.
What this machine would give is written as a lock of its own, by the function that wrote the first one, so that a
field which is added to locks is compared without being named here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from apertus_nemo.errors import ApertusError, Differs, InputError, UnfitEnvironment
from apertus_nemo.launch.environment import rank_environment
from apertus_nemo.launch.local import Places, Summary, launch, look_at_initial, prepare_data
from apertus_nemo.launch.show import Display
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.typed import from_tree
from apertus_nemo.record.canonical import dumps, is_unknown, loads_canonical, sha256_hex, unknown
from apertus_nemo.record.files import file_sha256, read_bytes
from apertus_nemo.record.initial import Initial
from apertus_nemo.record.lock import RELAUNCH, PinnedData, RunLock, Surroundings, build_lock, look
from apertus_nemo.record.observed import TABLE, compare_observed
from apertus_nemo.record.relaunched import Relaunched
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.source import MAX_ARCHIVE_BYTES, Source, find_source, source_of_archive
from apertus_nemo.record.step_line import StepLogHeader
from apertus_nemo.record.step_log import StepLogReader

_MAX_LOCK_BYTES = 16 * 2**20
_MAX_TEXT_BYTES = 2**20
_LISTED = 20  # differences in a message; all of them are in `Refused.differences`

# What a relaunch is; another value is another run, which `train` makes.
NOT_ALLOWED = ("config", "initial_state", "level", "overrides", "schema_version", "stages")


class _Absent:
    """In the place of a value of a field that is not there; null is a value."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclass(frozen=True)
class Difference:
    """One field that is not the same in two locks, by dotted path."""

    field: str
    locked: Any
    found: Any

    def tree(self) -> dict[str, Any]:
        """As plain data; what is absent is left out."""
        values = {"field": self.field, "found": self.found, "locked": self.locked}
        return {name: value for name, value in values.items() if value is not ABSENT}


class Refused(UnfitEnvironment):
    """Pinned things are not as they were."""

    def __init__(self, path: Path, differences: Sequence[Difference]) -> None:
        self.differences = list(differences)
        many = f"{len(differences)} pinned things are" if len(differences) > 1 else "a pinned thing is"
        names = " ".join(sorted({_to_allow(item.field) for item in differences if not _is_fixed(item.field)}))
        hint = [f"to let them differ, for ever on record: --allow {names.replace(' ', ' --allow ')}"] if names else []
        lines = [f"{path} cannot be relaunched here: {many} not as in its lock", *describe(differences), *hint]
        super().__init__("\n".join(lines))


def _to_allow(field: str) -> str:
    """The name that a message proposes: a whole package, a whole section of the data."""
    parts = field.split(".")
    return ".".join(parts[:2]) if parts[0] == "packages" else parts[0] if parts[0] in ("data", "source") else field


def _is_fixed(field: str) -> bool:
    return re.split(r"[.\[]", field, maxsplit=1)[0] in NOT_ALLOWED


def describe(differences: Sequence[Difference]) -> list[str]:
    """One line each: the field, the value in the lock, the value found."""
    lines = [
        f"  {item.field}: locked {_text(item.locked)}, found {_text(item.found)}" for item in differences[:_LISTED]
    ]
    more = len(differences) - _LISTED
    return [line if line.isprintable() else ascii(line)[1:-1] for line in lines] + (
        [f"  and {more} more (--json lists all)"] if more > 0 else []
    )


def _text(value: Any) -> str:
    return "absent" if value is ABSENT else dumps(value).decode()


@dataclass(frozen=True)
class Record:
    """What a relaunch reads of a run directory."""

    directory: RunDirectory
    lock: RunLock
    header: StepLogHeader

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises InputError where the folder holds no record."""
        directory = RunDirectory.open(Path(path))
        data = read_bytes(directory.lock, max_bytes=_MAX_LOCK_BYTES)
        lock = RunLock.from_bytes(data, what=str(directory.lock))
        return cls(directory, lock, StepLogReader(directory.steps).header)

    @property
    def whole(self) -> bool:
        """The lock is the one that the step log was written under."""
        return self.lock.digest == self.header.lock_digest

    def archive(self) -> bytes | None:
        """The archive of the source that ran; None where it is missing."""
        path = self.directory.source
        return read_bytes(path, max_bytes=MAX_ARCHIVE_BYTES) if path.exists() else None

    def observed(self) -> Any:
        """What the original's machine was; unknown, with the reason, where that is missing or was exchanged."""
        path = self.directory.observed
        if not path.exists():
            return unknown("the original has no observed.json")
        data = read_bytes(path, max_bytes=_MAX_TEXT_BYTES)
        if sha256_hex(data) != self.header.observation_digest:
            return unknown("observed.json of the original is not the one that its log names")
        return loads_canonical(data, what=str(path))

    def choices(self) -> tuple[RunConfig, list[str]]:
        """Recipe and overrides; from `recipe.yaml`, the second copy of both, where the lock was changed."""
        if self.whole:
            return from_tree(self.lock.tree["config"]), list(self.lock.tree["overrides"])
        import yaml

        text = read_bytes(self.directory.recipe, max_bytes=_MAX_TEXT_BYTES).decode(errors="replace")
        comment = re.search(r"^# overrides: (\[.*\])$", text, re.MULTILINE)
        try:
            return from_tree(yaml.safe_load(text)), list(json.loads(comment[1])) if comment else []
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{self.directory.recipe}: cannot be read: {error}") from error
        except InputError as error:
            raise InputError(
                f"{self.directory.lock} is not the lock of the step log, and {self.directory.recipe}, the second copy "
                f"of the recipe, is no whole one: {str(error).splitlines()[0]}"
            ) from error


def recorded_source(record: Record) -> Any:
    """The field `source` of the archive that the run kept; None where it is missing or is none."""
    archive = record.archive()
    if archive is None:
        return None
    return source_of_archive(archive, what=str(record.directory.source))


def here(
    record: Record,
    *,
    surroundings: Surroundings,
    data: PinnedData | None,
    shell: Mapping[str, str],
    initial: Initial | None = None,
) -> RunLock:
    """The lock that the recorded choices would get in these surroundings."""
    config, overrides = record.choices()
    lock = build_lock(
        config,
        overrides=overrides,
        environment=rank_environment(config, shell),
        data=data,
        surroundings=surroundings,
        initial=None if initial is None else initial.tree,
    )
    return RunLock.from_bytes(lock.to_bytes(), what="the lock of this machine")  # numbers as JSON holds them


def differences(lock: RunLock, found: RunLock) -> list[Difference]:
    """Every field of `lock` that is not the same in `found`, by dotted path; what only `found` has, too.

    Data stand in each stage again: a stage's are named only where they do not follow the run's own.
    """
    locked, now = ({key: value for key, value in item.tree.items() if key != RELAUNCH} for item in (lock, found))
    named = list(_differences(locked, now, ""))
    pairs = {(item.field, _text(item.locked), _text(item.found)) for item in named}
    result = []
    for item in named:
        mirror = re.sub(r"\Astages\[[0-9]+\]\.(?=data\.)", "", item.field)
        within = re.fullmatch(r"stages\[([0-9]+)\]\.data\.mixture\[([0-9]+)\]\.data\.(.+)", item.field)
        if within is not None:
            source = lock.tree["stages"][int(within[1])]["data"]["mixture"][int(within[2])]["source"]
            mirror = f"data.sources.{source}.{within[3]}"
        if mirror == item.field or (mirror, _text(item.locked), _text(item.found)) not in pairs:
            result.append(item)
    return result


def _differences(locked: Any, found: Any, path: str) -> Iterator[Difference]:
    """Down to the smallest parts that both have; an unknown value is one part."""
    if isinstance(locked, dict) and isinstance(found, dict) and not is_unknown(locked) and not is_unknown(found):
        for key in sorted(locked.keys() | found.keys()):
            yield from _differences(locked.get(key, ABSENT), found.get(key, ABSENT), f"{path}.{key}" if path else key)
    elif isinstance(locked, list) and isinstance(found, list) and len(locked) == len(found):
        for index, (one, other) in enumerate(zip(locked, found, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif _text(locked) != _text(found):
        yield Difference(path, locked, found)


@dataclass(frozen=True)
class Relaunch:
    """A recorded run, and what this machine would make of it."""

    record: Record
    found: RunLock
    places: Places
    source: Source  # that would run
    differences: list[Difference]

    def check(self, allow: Sequence[str]) -> RunLock:
        """The lock of the new run: the same bytes where nothing differs.

        Raises InputError for a record that was changed, or a wrong name in `allow`; Refused for other differences.
        """
        record = self.record
        if not record.whole:
            changed = (
                f"{record.directory.lock}: its lock digest is {record.lock.digest}, but the step log was written under "
                f"{record.header.lock_digest}: the lock was changed or exchanged"
            )
            raise InputError("\n".join([changed, *describe(self.differences)]))
        check_names(allow, record.lock, self.found)
        refused = [item for item in self.differences if not any(_covers(name, item.field) for name in allow)]
        if refused:
            raise Refused(record.directory.path, refused)
        allowed = [item.tree() for item in self.differences]
        observed = record.observed()
        for name in sorted({name for name in allow if _covers("observed", name)}):
            first = observed.get(name.removeprefix("observed."), observed) if isinstance(observed, dict) else observed
            allowed.append({"field": name, "found": unknown("the ranks find it: observed.json"), "locked": first})
        earlier = record.lock.tree.get(RELAUNCH)
        if not allowed:
            return record.lock
        again = self.found.allowing(record.lock, allowed)
        if earlier is None:
            return again
        return RunLock({**again.tree, RELAUNCH: {**again.tree[RELAUNCH], "earlier": earlier}})

    def start(self, run_directory: Path, *, allow: Sequence[str], display: Display) -> Summary:
        """Train in `run_directory`. Raises what `check` raises, and what `launch` does."""
        lock = self.check(allow)
        record = self.record
        note = Relaunched(
            lock_digest=record.lock.digest,
            run_id=record.header.run_id,
            observed=record.observed(),
            allowed=tuple(sorted(set(allow))),
        )
        files = {"relaunch.json": note.to_bytes(), "source.tar": self.source.archive}
        if self.source.patch is not None:
            files["source.patch"] = self.source.patch
        return launch(lock, run_directory, files=files, places=self.places, display=display)


def _covers(name: str, field: str) -> bool:
    return field == name or field.startswith((f"{name}.", f"{name}["))


def check_names(allow: Sequence[str], *locks: RunLock) -> None:
    """Raise InputError for a name that no field has, or that makes another run of it."""
    known = {"observed", *(f"observed.{name}" for name in TABLE)}
    for lock in locks:
        known |= _paths(lock.tree)
    for name in allow:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"--allow {name}: the lock has no such field{hint}")
        if _is_fixed(name):
            raise InputError(f"--allow {name}: that would be another run, not this one again; `train` makes one")


def _paths(tree: Any, prefix: str = "") -> set[str]:
    """Every dotted path of a tree, sections included."""
    pairs: list[tuple[str, Any]] = []
    if isinstance(tree, dict):
        pairs = [(f"{prefix}.{key}" if prefix else key, value) for key, value in tree.items()]
    elif isinstance(tree, list):
        pairs = [(f"{prefix}[{index}]", value) for index, value in enumerate(tree)]
    return {path for path, _ in pairs}.union(*(_paths(value, path) for path, value in pairs))


def prepare(
    path: Path,
    *,
    cache: Path,
    shell: Mapping[str, str],
    display: Display,
    data: Path | None = None,
    initial: Path | None = None,
) -> Relaunch:
    """Read the record in `path`, find its data and the weights that it starts from, and look at this machine.

    Both are looked for in the folders `data` and `initial`, where these are given. The source that counts as found is
    the one that runs, with what the record's archive says of where it came from.
    Raises InputError where there is no record, or where its data or weights are nowhere.
    """
    record = Record.read(path)
    source = find_source()
    config, _ = record.choices()
    corpus, pinned = find_data(record, config, cache=cache, display=display, folder=data)
    weights = find_weights(record, config, display=display, folder=initial)
    surroundings = look(source=with_recorded_patch(record, source), cache=cache)
    found = here(record, surroundings=surroundings, data=pinned, shell=shell, initial=weights)
    places = Places(corpus, cache, None if weights is None else weights.folder)
    return Relaunch(record, found, places, with_recorded_patch(record, source), differences(record.lock, found))


def with_recorded_patch(record: Record, source: Source) -> Source:
    """The same with the patch that the run kept, where it is the one that the source is said to have."""
    patch = source.tree.get("patch")
    if source.patch is not None or not isinstance(patch, dict) or "sha256" not in patch:
        return source
    path = record.directory.patch
    kept = read_bytes(path, max_bytes=MAX_ARCHIVE_BYTES) if path.exists() else None
    if kept is not None and sha256_hex(kept) == patch["sha256"]:
        return Source(source.tree, source.archive, kept)
    found = "absent" if kept is None else sha256_hex(kept)
    return Source({**source.tree, "patch": {"sha256": found}}, source.archive, kept)


def find_data(
    record: Record, config: RunConfig, *, cache: Path, display: Display, folder: Path | None
) -> tuple[Path, PinnedData]:
    """The data that the lock names, wherever they are now: a path is no part of what data are.

    Looked for in `folder` alone, if given; else where the recipe says, then where the original's ranks read them.
    Where only other data are found, those: they differ from the lock. Raises InputError where there are none.
    """
    if config.data.source != "built":
        return prepare_data(config, cache, display)
    if folder is not None:
        candidates = [folder]
    else:
        assert config.data.path is not None
        candidates = [Path(config.data.path).expanduser().resolve(), *_read_there(record, "APERTUS_CORPUS")]
    others: list[tuple[Path, PinnedData]] = []
    last: ApertusError = InputError(f"{candidates[0]} is not there")
    for candidate in candidates:
        try:
            corpus, stated = prepare_data(config, cache, display, folder=candidate)
        except (InputError, Differs) as error:
            last = error
            continue
        found = corpus, dataclasses.replace(stated, files=_hashed(corpus, stated.files))
        if _manifests(stated) == _locked_manifests(record.lock):
            return found
        others.append(found)
    if others:
        return others[0]
    raise InputError(f"{last}; --data DIR says where the data are now")


def find_weights(record: Record, config: RunConfig, *, display: Display, folder: Path | None) -> Initial | None:
    """The weights that the lock names as what the run starts from, wherever they are now; None where they are drawn.

    Looked for as `find_data` looks for data. Raises InputError where there are none.
    """
    if config.initial.kind == "none":
        if folder is not None:
            raise InputError(f"--initial {folder}: {record.directory.path} does not start from weights that are read")
        return None
    candidates = [None, *_read_there(record, "APERTUS_INITIAL")] if folder is None else [folder]
    others: list[Initial] = []
    last: InputError | None = None
    for candidate in candidates:
        try:
            found = look_at_initial(config, display, folder=candidate)
        except InputError as error:
            last = last or error
            continue
        assert found is not None
        if found.tree == record.lock.tree["initial_state"]:
            return found
        others.append(found)
    if others:
        return others[0]
    raise InputError(f"{last}; --initial DIR says where the weights are now")


def _read_there(record: Record, name: str) -> list[Path]:
    """Where the original's ranks read something, by its variable; empty where that is not known."""
    note = record.directory.attempt(0) / "environment.json"
    try:
        return [Path(json.loads(read_bytes(note, max_bytes=_MAX_TEXT_BYTES))[name])]
    except (ApertusError, ValueError, KeyError, TypeError):
        return []


def _manifests(data: PinnedData) -> set[str]:
    """The manifest digests of all corpora."""
    if data.manifest_digest is not None:
        return {data.manifest_digest}
    return {source.manifest_digest for source in data.sources.values()}


def _locked_manifests(lock: RunLock) -> set[str]:
    data = lock.tree["data"]
    if isinstance(data["manifest_digest"], str):
        return {data["manifest_digest"]}
    return {source["manifest_digest"] for source in data.get("sources", {}).values()}


def _hashed(corpus: Path, files: Mapping[str, str]) -> dict[str, str]:
    """The files of a corpus by what they are now, not by what its manifest says; without those that are gone."""
    return {name: file_sha256(corpus / name) for name in files if (corpus / name).is_file()}


def needs_recorded_source(record: Record, *, allow: Sequence[str], trust: bool) -> bytes | None:
    """The archive from which the run must be done again; None where the source that runs is the recorded one.

    None, too, where the archive is not the one of the lock, or where any source may run: `Relaunch.check` then says
    what differs. Raises InputError where it holds other code than the one that runs, and `trust` is not given.
    """
    locked = record.lock.tree["source"]
    running = find_source().tree
    if running == locked or not record.whole or "source" in allow:
        return None
    recorded = recorded_source(record)
    if recorded != locked:
        return None
    if recorded["files_digest"] != running["files_digest"] and not trust:
        commit = recorded["commit"] if isinstance(recorded["commit"], str) else "no commit"
        raise InputError(
            f"{record.directory.path} was made by other source than the installed one (version "
            f"{recorded['package_version']}, {commit}): running it again means running the code in "
            f"{record.directory.source}; add --trust if you trust where that file comes from"
        )
    return record.archive()


def observations(original: Path, again: Path) -> list[str]:
    """What the two machines differ in, and why that may be; one line each."""
    records = [Record.read(path) for path in (original, again)]
    first, now = (record.observed() for record in records)
    if "unknown" in first or "unknown" in now:
        return ["the observations of the two machines could not be compared"]
    config = records[1].lock.tree["config"]["reproducibility"]
    findings = compare_observed(first, now, level=config["level"], instruction_set=config["instruction_set"])
    return [finding.line() for finding in findings]
