"""Which files an EDF inherits from, in the order in which the engine evaluates them, and what results.

    chain = load_chain(document, Lookup(CE, folders, environment))
    merged = merge(chain.links)
    merged.env["NCCL_NET"].value, merged.env["NCCL_NET"].origin     # value, file and line

Bases first, left to right, each after its own bases; then the file itself: single values and entries of tables are
overwritten, mounts and devices are appended (cscs-docs container-engine/edf.md; raster src/lib.rs `extend`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.edf.dialects import Dialect
from apertus_nemo.edf.document import Document, read_document
from apertus_nemo.edf.expand import expand
from apertus_nemo.edf.finding import ERROR, Fault, Finding, short

MAX_LEVELS = 10  # both engines
MAX_LINKS = 200  # files of one chain, counted each time; ours: ten levels of ten bases would be 10^10

SINGLE = ("image", "workdir", "entrypoint", "writable")


@dataclass(frozen=True)
class Lookup:
    """How names of bases are found."""

    dialect: Dialect
    folders: tuple[Path, ...]
    environment: Mapping[str, str]

    def find(self, written: str) -> Path | None:
        """The file that a name of base_environment means, or None."""
        name = expand(written, self.environment, self.dialect).text
        if not name or "\0" in name:
            return None
        if is_path(name, self.dialect):
            return Path(name) if _is_file(Path(name)) else None
        candidates = (folder / f"{name}.toml" for folder in self.folders)
        return next((path for path in candidates if _is_file(path)), None)


def is_path(name: str, dialect: Dialect) -> bool:
    """Whether a name is taken as a path and not searched for."""
    return name.startswith(("/", ".")) or (dialect.name == "sarus" and name.endswith(".toml"))


def search_folders(environment: Mapping[str, str], dialect: Dialect) -> tuple[Path, ...]:
    """The folders in which the engine looks for EDFs, from the environment of who starts it."""
    written = environment.get("EDF_PATH")
    if written is None:
        home = environment.get("HOME")
        parts = [f"{home}/.edf"] if home else []
    else:
        parts = written.split(":") if dialect.splits_search_path else [written]
    if dialect.system_folder:
        parts.append(dialect.system_folder)
    return tuple(Path(part) for part in parts if part)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Link:
    """One evaluated file; `via` names the files through which it came, outermost first."""

    document: Document
    via: tuple[str, ...]


@dataclass
class Chain:
    """All files in order of evaluation, the file itself last; `faults` is why some could not be read."""

    links: list[Link] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)


def bases(document: Document) -> list[str]:
    """The names in base_environment; what is no string is left to the rules."""
    written = document.get("base_environment")
    items = [written] if isinstance(written, str) else written if isinstance(written, list) else []
    return [item for item in items if isinstance(item, str) and item]


def load_chain(document: Document, lookup: Lookup) -> Chain:
    """Read the bases of a document. Never raises: what cannot be read is in `faults`."""
    chain = Chain()
    read: dict[str, Document | Finding] = {}
    count = 0

    def fault(at: Document, index: int, rule: str, what: str, why: str, do: str) -> None:
        written = at.get("base_environment")
        place = ("base_environment", index) if isinstance(written, list) else ("base_environment",)
        chain.faults.append(Finding(ERROR, rule, at.name, at.line(*place), what, why, do))

    def visit(at: Document, inside: tuple[tuple[str, str], ...]) -> bool:
        nonlocal count
        for index, name in enumerate(bases(at)):
            count += 1
            if count > MAX_LINKS:
                fault(
                    at,
                    index,
                    "too-many-bases",
                    f"more than {MAX_LINKS} files",
                    "no EDF needs that",
                    "inherit from fewer",
                )
                return False
            path = lookup.find(name)
            if path is None:
                fault(at, index, "base-not-found", *_not_found(name, at, lookup))
                continue
            identity = os.path.realpath(path)
            if identity in {seen for seen, _ in inside}:
                names = [shown for seen, shown in inside]
                names = names[[seen for seen, _ in inside].index(identity) :]
                circle = " -> ".join([*names, names[0]])
                why = f"an EDF cannot inherit from itself: {short(circle, 400)}"
                fault(
                    at,
                    index,
                    "base-cycle",
                    f"base_environment {short(name)!r} goes in a circle",
                    why,
                    "remove one of the two",
                )
                continue
            if len(inside) >= MAX_LEVELS:
                why = f"both engines stop after {MAX_LEVELS} levels"
                fault(
                    at,
                    index,
                    "base-depth",
                    f"base_environment {short(name)!r} is level {len(inside) + 1}",
                    why,
                    "merge some",
                )
                continue
            if identity not in read:
                try:
                    read[identity] = read_document(path)
                except Fault as error:
                    read[identity] = error.finding
            base = read[identity]
            if isinstance(base, Finding):
                chain.faults.append(base)
                continue
            if not visit(base, (*inside, (identity, base.name))):
                return False
            chain.links.append(Link(base, tuple(shown for _, shown in inside)))
        return True

    own = os.path.realpath(document.path) if document.path is not None else ""
    visit(document, ((own, document.name),))
    chain.links.append(Link(document, ()))
    return chain


def _not_found(name: str, at: Document, lookup: Lookup) -> tuple[str, str, str]:
    what = f"base_environment {short(name)!r} was not found"
    if is_path(name, lookup.dialect):
        why = "there is no such file; a path that starts with ./ is relative to where srun is called, not to this file"
        return what, why, "give an absolute path"
    places = ", ".join(short(folder) for folder in lookup.folders) or "nothing: neither EDF_PATH nor HOME is set"
    why = f"searched: {places}"
    beside = at.path.parent / f"{name}.toml" if at.path is not None and "/" not in name and "\0" not in name else None
    if beside is not None and _is_file(beside):
        return (
            what,
            why,
            f"the one beside this file is not looked at: give its absolute path, or --edf-path {beside.parent}",
        )
    if "/" in name:
        return what, why, "a path must be absolute, or start with ./"
    return what, why, "set EDF_PATH or give --edf-path, or write an absolute path"


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    file: str
    line: int
    via: tuple[str, ...] = ()

    def __str__(self) -> str:
        way = f", through {' -> '.join(self.via)}" if self.via else ""
        return f"{self.file}:{self.line}{way}"


@dataclass(frozen=True)
class Value:
    """A value as written, where, and what it replaced."""

    value: Any
    origin: Origin
    replaced: tuple[Origin, ...] = ()


@dataclass
class Merged:
    """What results from a chain, before expansion. Values may be of a wrong type: the rules say so."""

    single: dict[str, Value] = field(default_factory=dict)
    mounts: list[Value] = field(default_factory=list)
    devices: list[Value] = field(default_factory=list)
    env: dict[str, Value] = field(default_factory=dict)
    annotations: dict[str, Value] = field(default_factory=dict)

    def text(self, key: str) -> str | None:
        """A single value that is a non-empty string, or None."""
        found = self.single.get(key)
        return found.value if found is not None and isinstance(found.value, str) and found.value else None

    def annotation(self, name: str) -> str | None:
        """An annotation as the engine sees it: text; None where it is not written."""
        found = self.annotations.get(name)
        if found is None:
            return None
        return found.value if isinstance(found.value, str) else str(found.value).lower()

    def variable(self, name: str) -> str | None:
        """A variable of [env] that is a string, or None."""
        found = self.env.get(name)
        return found.value if found is not None and isinstance(found.value, str) else None

    def texts(self) -> Iterator[tuple[str, str, Origin]]:
        """(key, text, origin) of every string that variables are expanded in."""
        for key, value in self.single.items():
            if isinstance(value.value, str):
                yield key, value.value, value.origin
        for name, items in (("mounts", self.mounts), ("devices", self.devices)):
            for value in items:
                if isinstance(value.value, str):
                    yield name, value.value, value.origin
        for table, entries in (("env", self.env), ("annotations", self.annotations)):
            for key, value in entries.items():
                if isinstance(value.value, str):
                    yield f"{table}.{key}", value.value, value.origin


def merge(links: list[Link]) -> Merged:
    """What the engine makes of the files of a chain."""
    merged = Merged()

    def put(table: dict[str, Value], key: str, value: Any, origin: Origin) -> None:
        former = table.get(key)
        table[key] = Value(value, origin, () if former is None else (*former.replaced, former.origin)[-5:])

    for link in links:
        document = link.document

        def origin(*path: str | int, document: Document = document, via: tuple[str, ...] = link.via) -> Origin:
            return Origin(document.name, document.line(*path), via)

        for key in SINGLE:
            if key in document.tree:
                put(merged.single, key, document.tree[key], origin(key))
        for name, items in (("mounts", merged.mounts), ("devices", merged.devices)):
            written = document.get(name)
            if isinstance(written, list):
                items += [Value(item, origin(name, index)) for index, item in enumerate(written)]
        env = document.get("env")
        if isinstance(env, dict):
            for key, value in env.items():
                put(merged.env, key, value, origin("env", key))
        for annotation in document.all_annotations:
            put(merged.annotations, annotation.name, annotation.value, Origin(document.name, annotation.line, link.via))
    return merged
