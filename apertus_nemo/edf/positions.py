"""Where each key of a TOML file stands, which `tomllib` does not tell.

    locate('[env]\\nA = "1"\\n').lines[("env", "A")]  # 2

The text is scanned, not checked: at the first thing that is not TOML the scan ends, and `tomllib`, which reads the
same text afterwards, says what is wrong. What would cost `tomllib` too much is refused here: it takes time that grows
with the square of a dotted key's parts, and Python's stack for nested values.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from dataclasses import dataclass, field

# The path of a value: names of tables and keys; positions in arrays, from 0.
Path = tuple[str | int, ...]

MAX_PARTS = 32  # of a dotted key; an annotation has five
MAX_DEPTH = 32  # of values in values

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BASIC = re.compile(r'"(?:[^"\\\n]|\\.)*+"')
_LONG_BASIC = re.compile(r'(?s:(?:[^"\\]|\\.|"(?!""))*+""")')  # after the first three quotes
_LONG_LITERAL = re.compile(r"(?s:(?:[^']|'(?!''))*+''')")
_LITERAL = re.compile(r"'[^'\n]*'")
_SCALAR = re.compile(r"[^,\]}#\n]+")


class TooComplex(Exception):
    """What no EDF needs: (line, what it is)."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line, self.what = line, what


class _End(Exception):
    """Not TOML, or not understood; the scan ends here."""


@dataclass
class Positions:
    """Lines, from 1, of tables, keys and items of arrays; of what is defined twice, the first line."""

    lines: dict[Path, int] = field(default_factory=dict)
    headers: dict[Path, int] = field(default_factory=dict)  # of [tables]
    again: list[tuple[Path, int]] = field(default_factory=list)  # what is defined once more, and its line there


def locate(text: str) -> Positions:
    """Scan a TOML text. Raises TooComplex."""
    scanner = _Scanner(text)
    try:
        scanner.statements()
    except _End:
        pass
    return scanner.found


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.found = Positions()
        self.arrays: dict[Path, int] = {}  # arrays of tables, and the position of their last table
        self.dotted: set[Path] = set()  # made by keys and their values, so that no header may open them again

    def line(self) -> int:
        return bisect_right(self.starts, self.at)

    def skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def take(self, token: str) -> bool:
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def want(self, token: str) -> None:
        if not self.take(token):
            raise _End

    def match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None or match.end() == self.at:
            raise _End
        self.at = match.end()
        return match[0]

    def statements(self) -> None:
        table: Path = ()
        while True:
            self.skip(_BLANK)
            if self.at >= len(self.text):
                return
            line = self.line()
            if self.take("[["):
                path = self.inside(self.key())
                self.want("]]")
                self.note(path, line)
                self.arrays[path] = self.arrays.get(path, -1) + 1
                table = (*path, self.arrays[path])
                self.note(table, line)
            elif self.take("["):
                table = self.inside(self.key())
                self.want("]")
                if table in self.found.headers or table in self.dotted:
                    self.found.again.append((table, line))
                self.found.headers.setdefault(table, line)
                self.note(table, line)
            else:
                self.pair(table, 0)
            self.skip(_SPACE)
            if self.at < len(self.text) and self.text[self.at] not in "\r\n#":
                raise _End

    def inside(self, path: tuple[str, ...]) -> Path:
        """The path of a table's header, with the positions in arrays of tables that it goes through."""
        done: Path = ()
        for part in path[:-1]:
            done = (*done, part)
            if done in self.arrays:
                done = (*done, self.arrays[done])
        return (*done, path[-1])

    def note(self, path: Path, line: int) -> None:
        for length in range(1, len(path) + 1):
            self.found.lines.setdefault(path[:length], line)

    def key(self) -> tuple[str, ...]:
        parts: list[str] = []
        while True:
            self.skip(_SPACE)
            start = self.text[self.at : self.at + 1]
            if start == '"':
                parts.append(_plain(self.match(_BASIC)))
            elif start == "'":
                parts.append(self.match(_LITERAL)[1:-1])
            else:
                parts.append(self.match(_BARE))
            if len(parts) > MAX_PARTS:
                raise TooComplex(self.line(), f"a key of more than {MAX_PARTS} parts")
            self.skip(_SPACE)
            if not self.take("."):
                return tuple(parts)

    def pair(self, table: Path, depth: int) -> None:
        line = self.line()
        path = (*table, *self.key())
        self.want("=")
        if path in self.found.lines:
            self.found.again.append((path, line))
        self.note(path, line)
        self.dotted.update(path[:length] for length in range(len(table) + 1, len(path) + 1))
        self.value(path, depth)

    def value(self, path: Path, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TooComplex(self.line(), f"values nested deeper than {MAX_DEPTH} levels")
        self.skip(_SPACE)
        if self.take('"""'):
            self.long_string(_LONG_BASIC, '"')
        elif self.take("'''"):
            self.long_string(_LONG_LITERAL, "'")
        elif self.text.startswith('"', self.at):
            self.match(_BASIC)
        elif self.text.startswith("'", self.at):
            self.match(_LITERAL)
        elif self.take("["):
            self.array(path, depth)
        elif self.take("{"):
            self.inline_table(path, depth)
        else:
            self.match(_SCALAR)

    def long_string(self, pattern: re.Pattern[str], quote: str) -> None:
        self.match(pattern)
        for _ in range(2):  # up to two more quotes belong to the string
            self.take(quote)

    def array(self, path: Path, depth: int) -> None:
        position = 0
        while True:
            self.skip(_BLANK)
            if self.take("]"):
                return
            self.note((*path, position), self.line())
            self.value((*path, position), depth + 1)
            position += 1
            self.skip(_BLANK)
            if not self.take(","):
                self.want("]")
                return

    def inline_table(self, path: Path, depth: int) -> None:
        self.skip(_SPACE)
        while not self.take("}"):
            self.pair(path, depth + 1)
            self.skip(_SPACE)
            if not self.take(","):
                self.want("}")
                return
            self.skip(_SPACE)


def _plain(token: str) -> str:
    """The text of a basic string."""
    if "\\" not in token:
        return token[1:-1]
    try:
        value: str = tomllib.loads(f"x = {token}")["x"]
    except ValueError:
        raise _End from None
    return value
