"""The definition of a family of images, `containers/<family>/image.toml`: strict, every fault named with its key.

    definition = read_definition(folder / "image.toml")
    definition.base.kind, definition.requirements["linux/arm64"], definition.epoch
    definition.digest          # SHA-256 over its content: comments and order do not matter

A definition holds choices; what follows from them, every version and hash, is in the lock (`image/lock.py`).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.image.families import FAMILY, MAX_BYTES, PLATFORM, VERSION
from apertus_nemo.recipe.suggest import nearest
from apertus_nemo.record.canonical import dumps, sha256_hex
from apertus_nemo.record.files import read_bytes

SCHEMA_VERSION = 1
_MAX_TEXT = 1000

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{0,99}\Z")  # Debian's, and a normalised name of Python's
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}\Z")
_LABEL = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*(/[a-z0-9._-]+)?\Z")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")
_INSIDE = re.compile(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+\Z")  # a folder of the image
_RELATIVE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*\Z")  # a file of the checkout
_SUITE = re.compile(r"[a-z][a-z0-9-]*\Z")
_REFERENCE = re.compile(r"[A-Za-z0-9.:-]+(/[a-z0-9._-]+)+:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_URL = re.compile(r"(https|file)://[A-Za-z0-9._~:/-]+\Z")


@dataclass(frozen=True)
class Provided:
    """A Python package of the base, which nothing above may replace."""

    version: str | None  # None: not known
    counts_as: str | None  # the release that stands in for it when bounds are checked


@dataclass(frozen=True)
class Base:
    """What an image stands on."""

    kind: str  # "debian": made from locked packages; "image": an image in a registry
    release: str = ""  # of Debian
    suites: tuple[tuple[str, str], ...] = ()  # (archive, suite)
    reference: str = ""  # HOST/NAME:TAG
    digest: str = ""  # of a manifest or an index
    licence: str = ""
    environment: tuple[tuple[str, str], ...] = ()  # name -> beginning of what the base must say
    provides: tuple[tuple[str, Provided], ...] = ()


@dataclass(frozen=True)
class SourceTree:
    """A source tree by commit: what `git archive` writes of it has this hash."""

    name: str
    url: str
    commit: str
    sha256: str
    target: str  # folder in the image


@dataclass(frozen=True)
class Definition:
    """One family, at its current version."""

    family: str
    version: str
    date: str  # ISO
    title: str
    machine: str
    platforms: tuple[str, ...]
    base: Base
    debian_packages: tuple[str, ...]
    python_version: str
    prefix: str
    installer: str
    source_only: tuple[str, ...]
    requirements: Mapping[str, tuple[str, ...]]  # by platform
    sources: tuple[SourceTree, ...]
    environment: Mapping[str, str]
    labels: Mapping[str, str]
    imports: tuple[str, ...]
    network_plugin: str | None
    digest: str

    @property
    def name(self) -> str:
        """As in "cpu-1.0.0"."""
        return f"{self.family}-{self.version}"

    @property
    def epoch(self) -> int:
        """The time stamp of everything inside, in seconds since 1970: the start of `date`, UTC."""
        day = datetime.date.fromisoformat(self.date)
        return int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp())


def read_definition(path: Path) -> Definition:
    """Read a definition; raises InputError with one line a fault."""
    return parse_definition(read_bytes(path, max_bytes=MAX_BYTES), what=str(path))


def parse_definition(data: bytes, *, what: str) -> Definition:
    """As `read_definition`, of bytes; `what` begins every message."""
    import tomllib

    try:
        tree = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: is not TOML: {error}") from error
    reader = _Reader(what)
    definition = reader.definition(tree)
    if reader.faults:
        raise InputError("\n".join(reader.faults))
    return definition


class _Reader:
    """Takes a tree apart and collects what is wrong with it."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.faults: list[str] = []

    def bad(self, key: str, message: str) -> None:
        self.faults.append(f"{self.what}: {key} {message}")

    def table(self, tree: Any, key: str, known: set[str] | None) -> dict[str, Any]:
        """A table with known keys only; an empty one in place of something else."""
        if not isinstance(tree, dict):
            self.bad(key, f"must be a table, not {_shown(tree)}")
            return {}
        for name in tree if known is not None else ():
            if known is not None and name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known))}"
                self.bad(f"{key}.{name}" if key else name, f"is not a key of a definition; {hint}")
        return tree

    def text(
        self, tree: Mapping[str, Any], key: str, pattern: re.Pattern[str] | None, like: str, where: str = ""
    ) -> str:
        """A text that is there, printable, and of a form; "" in place of anything else."""
        full, value = f"{where}{key}", tree.get(key)
        if value is None:
            self.bad(full, f"is missing: write {like}")
        elif not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
            self.bad(full, f"must be text such as {like}, not {_shown(value)}")
        elif pattern is not None and not pattern.match(value):
            self.bad(full, f"{_shown(value)} is not like {like}")
        else:
            return value
        return ""

    def texts(
        self, tree: Mapping[str, Any], key: str, pattern: re.Pattern[str], like: str, where: str = ""
    ) -> tuple[str, ...]:
        """A list of texts without repetition; absent means empty."""
        full, value = f"{where}{key}", tree.get(key, [])
        if not isinstance(value, list):
            self.bad(full, f"must be a list of texts such as {like}, not {_shown(value)}")
            return ()
        found: list[str] = []
        for item in value:
            if not isinstance(item, str) or not pattern.match(item):
                self.bad(full, f"holds {_shown(item)}, which is not like {like}")
            elif item in found:
                self.bad(full, f"holds {item!r} twice")
            else:
                found.append(item)
        return tuple(found)

    def mapping(self, tree: Mapping[str, Any], key: str, names: re.Pattern[str], like: str) -> dict[str, str]:
        """A table of texts; absent means empty."""
        found = {}
        for name, value in self.table(tree.get(key, {}), key, None).items():
            if not names.match(name):
                self.bad(f"{key}.{name[:60]}", f"is not a name like {like}")
            elif not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
                self.bad(f"{key}.{name}", f"must be text, not {_shown(value)}")
            else:
                found[name] = value
        return found

    def definition(self, raw: Any) -> Definition:
        top = {"base", "date", "debian", "environment", "family", "labels", "machine", "platforms", "python"}
        tree = self.table(raw, "", top | {"schema_version", "selftest", "sources", "title", "version"})
        if tree.get("schema_version") != SCHEMA_VERSION:
            self.bad("schema_version", f"is {_shown(tree.get('schema_version'))}; this version reads {SCHEMA_VERSION}")
        platforms = self.texts(tree, "platforms", PLATFORM, "linux/arm64")
        if not platforms:
            self.bad("platforms", "is empty: name at least one, such as linux/arm64")
        base = self.base(self.table(tree.get("base"), "base", _BASE_KEYS))
        debian = self.table(tree.get("debian", {}), "debian", {"packages"})
        packages = self.texts(debian, "packages", _PACKAGE, "ca-certificates", "debian.")
        if packages and base.kind == "image":
            self.bad("debian.packages", "cannot stand on an image: what is installed there is not known to the lock")
        python = self.table(
            tree.get("python"), "python", {"installer", "prefix", "requirements", "source_only", "version"}
        )
        selftest = self.table(tree.get("selftest", {}), "selftest", {"imports", "network_plugin"})
        plugin = selftest.get("network_plugin")
        if plugin is not None and (not isinstance(plugin, str) or not plugin.isprintable() or len(plugin) > 100):
            self.bad("selftest.network_plugin", f"must be text such as Libfabric, not {_shown(plugin)}")
        labels = self.mapping(tree, "labels", _LABEL, "org.opencontainers.image.licenses")
        for name in sorted(set(labels) & RESERVED_LABELS):
            self.bad(f"labels.{name}", "is written by the build")
        return Definition(
            family=self.text(tree, "family", FAMILY, "gh200"),
            version=self.text(tree, "version", VERSION, "1.0.0"),
            date=self.date(tree.get("date")),
            title=self.text(tree, "title", None, "Apertus on CPUs"),
            machine=self.text(tree, "machine", None, "GH200 nodes"),
            platforms=platforms,
            base=base,
            debian_packages=packages,
            python_version=self.text(python, "version", re.compile(r"3\.\d{1,2}\Z"), "3.11", "python."),
            prefix=self.text(python, "prefix", _INSIDE, "/opt/apertus-nemo", "python."),
            installer=self.text(python, "installer", _RELATIVE, "requirements/bootstrap.txt", "python."),
            source_only=self.texts(python, "source_only", _PACKAGE, "wget", "python."),
            requirements=self.requirements(python.get("requirements", {}), platforms),
            sources=self.sources(tree.get("sources", [])),
            environment=self.mapping(tree, "environment", _VARIABLE, "HF_HUB_OFFLINE"),
            labels=labels,
            imports=self.texts(selftest, "imports", _MODULE, "megatron.core", "selftest."),
            network_plugin=plugin if isinstance(plugin, str) else None,
            digest="" if self.faults else sha256_hex(dumps(_plain(tree))),
        )

    def base(self, tree: dict[str, Any]) -> Base:
        kind = tree.get("kind")
        if kind == "debian":
            self.only(tree, {"kind", "release", "suites"}, "debian")
            suites = tree.get("suites")
            pairs = suites if isinstance(suites, list) else []
            good = tuple(
                (pair[0], pair[1])
                for pair in pairs
                if isinstance(pair, list)
                and len(pair) == 2
                and all(isinstance(part, str) and _SUITE.match(part) for part in pair)
            )
            if not good or len(good) != len(pairs):
                self.bad("base.suites", f'must be a list of pairs such as ["debian", "bookworm"], not {_shown(suites)}')
            return Base("debian", release=self.text(tree, "release", _SUITE, "bookworm", "base."), suites=good)
        if kind == "image":
            self.only(tree, {"digest", "environment", "kind", "licence", "provides", "reference"}, "image")
            return Base(
                "image",
                reference=self.text(tree, "reference", _REFERENCE, "nvcr.io/nvidia/pytorch:25.11-py3", "base."),
                digest=self.text(tree, "digest", _DIGEST, "sha256: and 64 hex digits", "base."),
                licence=self.text(tree, "licence", None, "the name of a licence", "base."),
                environment=tuple(sorted(self.mapping(tree, "environment", _VARIABLE, "CUDA_VERSION").items())),
                provides=self.provides(tree.get("provides", {})),
            )
        self.bad("base.kind", f"must be debian or image, not {_shown(kind)}")
        return Base("debian")

    def only(self, tree: Mapping[str, Any], keys: set[str], kind: str) -> None:
        for name in sorted((set(tree) & _BASE_KEYS) - keys):
            self.bad(f"base.{name}", f"has no meaning for a base of kind {kind}")

    def provides(self, raw: Any) -> tuple[tuple[str, Provided], ...]:
        found = []
        for name, value in self.table(raw, "base.provides", None).items():
            key = f"base.provides.{name[:60]}"
            if not _PACKAGE.match(name):
                self.bad(key, "is not the normalised name of a Python package")
                continue
            entry = self.table(value, key, {"counts_as", "version"})
            texts = {part: entry.get(part) for part in ("version", "counts_as")}
            for part, text in texts.items():
                if text is not None and (not isinstance(text, str) or not re.match(r"\d[A-Za-z0-9.+!-]{0,99}\Z", text)):
                    self.bad(f"{key}.{part}", f"must be a version, not {_shown(text)}")
            found.append((name, Provided(texts["version"], texts["counts_as"])))
        return tuple(sorted(found, key=lambda item: item[0]))

    def requirements(self, raw: Any, platforms: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        tree = self.table(raw, "python.requirements", set(platforms))
        found = {}
        for platform in platforms:
            found[platform] = self.texts(tree, platform, _RELATIVE, "requirements/a.txt", "python.requirements.")
            if not found[platform]:
                self.bad(f"python.requirements.{platform}", "is missing: name its hashed requirements")
        return found

    def sources(self, raw: Any) -> tuple[SourceTree, ...]:
        if not isinstance(raw, list):
            self.bad("sources", f"must be a list of tables, not {_shown(raw)}")
            return ()
        found = []
        for number, item in enumerate(raw):
            where = f"sources.{number}."
            tree = self.table(item, where[:-1], {"commit", "name", "sha256", "target", "url"})
            found.append(
                SourceTree(
                    self.text(tree, "name", _PACKAGE, "megatron-lm", where),
                    self.text(tree, "url", _URL, "https://HOST/NAME.git", where),
                    self.text(tree, "commit", _COMMIT, "40 hex digits", where),
                    self.text(tree, "sha256", _SHA256, "64 hex digits", where),
                    self.text(tree, "target", _INSIDE, "/opt/src/megatron-lm", where),
                )
            )
        return tuple(found)

    def date(self, value: Any) -> str:
        if type(value) is not datetime.date or value.year < 1980:
            self.bad("date", f"must be a day such as 2026-11-25, not {_shown(value)}")
            return "1980-01-01"
        return value.isoformat()


_BASE_KEYS = {"digest", "environment", "kind", "licence", "provides", "reference", "release", "suites"}
RESERVED_LABELS = frozenset(
    {
        "ai.apertus.image.family",
        "ai.apertus.image.lock",
        "org.opencontainers.image.created",
        "org.opencontainers.image.revision",
        "org.opencontainers.image.title",
        "org.opencontainers.image.version",
        "org.opencontainers.image.base.digest",
        "org.opencontainers.image.base.name",
    }
)


def _plain(value: Any) -> Any:
    """TOML's values as JSON has them: days and times become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else value


def _shown(value: Any) -> str:
    """A value for a message, short."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
