"""One EDF as written: TOML with the line of every value.

document = read_document(Path("train.toml"))
document.get("image"), document.line("image")
document.annotations["com.hooks.cxi.enabled"]     # however it was nested or quoted
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from apertus_nemo.edf.finding import ERROR, Fault, Finding, short
from apertus_nemo.edf.positions import Positions, TooComplex, locate

MAX_BYTES = 256 * 1024  # of a file; the longest public one has 4 KiB


@dataclass(frozen=True)
class Annotation:
    """An annotation under its dotted name; `path` is how it was written."""

    name: str
    value: Any
    line: int
    path: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A TOML file that parses; whether it is an EDF, the rules say."""

    name: str  # as messages call it
    path: Path | None
    tree: dict[str, Any] = field(repr=False)
    positions: Positions = field(repr=False)

    def get(self, key: str) -> Any:
        """The value of a top-level key, or None."""
        return self.tree.get(key)

    def line(self, *path: str | int) -> int:
        """The line of a value, or that of the nearest table or array around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.positions.lines:
                return self.positions.lines[path[:length]]
        return 1

    @cached_property
    def all_annotations(self) -> tuple[Annotation, ...]:
        """All annotations in the order of the file; a name that was written in two ways comes twice."""
        table = self.tree.get("annotations")
        return tuple(self._flat(table, ())) if isinstance(table, dict) else ()

    @cached_property
    def annotations(self) -> dict[str, Annotation]:
        """The annotations by their dotted names."""
        return {annotation.name: annotation for annotation in self.all_annotations}

    def _flat(self, table: dict[str, Any], path: tuple[str, ...]) -> Iterator[Annotation]:
        for key, value in table.items():
            here = (*path, key)
            if isinstance(value, dict):
                yield from self._flat(value, here)
            else:
                yield Annotation(".".join(here), value, self.line("annotations", *here), here)


def read_document(path: Path, name: str | None = None) -> Document:
    """Read an EDF. Raises Fault for what is no regular file, no UTF-8 or no TOML; nothing is waited for."""
    name = short(path if name is None else name, 300)
    return parse_document(_read(path, name), name, path)


def parse_document(data: bytes, name: str, path: Path | None = None) -> Document:
    """The EDF in `data`. Raises Fault."""

    def fault(rule: str, line: int | None, what: str, why: str, do: str) -> Fault:
        return Fault(Finding(ERROR, rule, name, line, what, why, do))

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise fault(
            "not-utf8", line, f"byte {error.start} is 0x{data[error.start]:02x}", "TOML is UTF-8", "save it as UTF-8"
        ) from None
    if text.startswith("\ufeff"):
        raise fault("not-toml", 1, "the file starts with a byte order mark", "TOML has none", "save it without one")
    try:
        positions = locate(text)
    except TooComplex as error:
        raise fault("too-complex", error.line, error.what, "no EDF needs that", "is this the right file?") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise fault("not-toml", *_explained(str(error), text, positions)) from None
    except (ValueError, RecursionError):
        raise fault("not-toml", None, "this is not TOML", "a value in it cannot be read", "correct the file") from None
    return Document(name, path, tree, positions)


def _explained(message: str, text: str, positions: Positions) -> tuple[int | None, str, str, str]:
    """(line, what, why, do) of an error of tomllib's."""
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)\Z", message)
    said = short(message[: match.start()] if match else message)
    lines = text.splitlines() or [""]
    line = int(match[1]) if match and match[1] else len(lines)
    written = lines[line - 1].strip() if line <= len(lines) else ""
    if re.search(r"twice|namespace|[Oo]verwrite|[Rr]edefin", said):
        path, line = next(((p, n) for p, n in positions.again if n >= line - 1), ((), line))
        first = positions.lines.get(path)
        here = ".".join(map(str, path)) or written
        what = f"{short(here)} is defined a second time" + (f" (first in line {first})" if first else "")
        if path[:1] == ("annotations",) or "annotations" in written:
            why = "a table of TOML can be opened in one place only, and a dotted key in [annotations] opens it too"
            do = "write all annotations below one [annotations], as com.hooks.NAME.KEY = ..."
        else:
            why, do = "in TOML a key or a table stands in one place only", "keep one of the two"
        return line, what, why, do
    if re.fullmatch(r'"?[\w.-]+"?\s*=\s*("[^"]*"|\'[^\']*\')\s*,\s*(#.*)?', written):
        return line, "a comma at the end of the line", "TOML has none between keys", "remove the comma"
    if re.match(r'"?[\w.-]+"?\s*=\s*[A-Za-z/$.~]', written):
        return line, f"not TOML: {said}", "text stands in quotes in TOML", 'put the value into "..."'
    if re.match(r'"?[\w.-]+"?\s*:', written):
        return line, f"not TOML: {said}", "this line looks like YAML", 'write it as key = "value"'
    if said == "Unclosed array":
        why = "a comma is missing between two items, or ] at the end"
        return line, f"not TOML: {said}", why, "look at this line and the one before"
    return line, f"not TOML: {said}", "the engine would not read on", "correct the line"


def _read(path: Path, name: str) -> bytes:
    def fault(what: str, why: str, do: str) -> Fault:
        return Fault(Finding(ERROR, "unreadable", name, None, what, why, do))

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise fault("cannot be read", reason, "give the path of an EDF") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise fault("cannot be read", "it is not a regular file", "give the path of an EDF")
        data = b""
        while len(data) <= MAX_BYTES and (block := os.read(descriptor, MAX_BYTES + 1)):
            data += block
    except OSError as error:
        raise fault("cannot be read", error.strerror or str(error), "give the path of an EDF") from None
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise fault(f"more than {MAX_BYTES:,} bytes", "no EDF is that large", "is this the right file?")
    return data
