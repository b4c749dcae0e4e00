"""Variables in EDFs, as each engine expands them.

    expand("${SCRATCH}/x", {"SCRATCH": "/s"}, CE).text      # "/s/x"
    expand("$SCRATCH/x", {"SCRATCH": "/s"}, CE).text        # "$SCRATCH/x": production knows braces only

Nothing is executed: of bash's forms, the usual ones are done here and the others are left as they stand and named.
Sources: cscs-docs container-engine/edf.md; sarus-suite/raster 20f75bd src/common.rs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from apertus_nemo.edf.dialects import Dialect

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_CE = re.compile(
    rf"\$\$\{{|\$\{{(?P<name>{_NAME})(?P<rest>:-[^{{}}]*)?\}}|\$\{{(?P<bad>[^}}]*)\}}?|\$(?P<bare>{_NAME})"
)
_BASH = re.compile(
    rf"\\[$`\"\\]|\$\$|\$\{{(?P<name>{_NAME})(?P<rest>:?-[^{{}}$]*)?\}}|\$\{{(?P<bad>[^}}]*)\}}?|\$(?P<bare>{_NAME})"
)
# What raster refuses before it asks bash.
_BANNED = re.compile(r"(?:[^\\]|^)(\$\(|`|;|\")")
_COMMAND = re.compile(r"\$\(|`")


@dataclass(frozen=True)
class Expanded:
    """What became of a text."""

    text: str  # undefined variables stand in it as written
    names: tuple[str, ...]  # variables that were asked for
    missing: tuple[str, ...]  # of them, those that are not set and have no default
    unbraced: tuple[str, ...]  # $VAR
    odd: tuple[str, ...]  # forms that the engine does not document, or that are not done here
    refused: str | None  # what the engine refuses the text for
    command: bool  # $(...) or `...`, which no engine runs


def expand(text: str, environment: Mapping[str, str], dialect: Dialect) -> Expanded:
    """Expand the variables of one value of an EDF with the environment of the host."""
    bash = dialect.bash_variables
    names: list[str] = []
    missing: list[str] = []
    unbraced: list[str] = []
    odd: list[str] = []

    def one(match: re.Match[str]) -> str:
        written = match[0]
        if match["bad"] is not None:
            odd.append(written)
            return written
        if match["bare"] is not None:
            unbraced.append(match["bare"])
            if not bash:
                return written
        name = match["name"] or match["bare"]
        if name is None:  # $${ of production; an escape, or $$, of bash
            if written == "$$":
                odd.append(written)
                return written
            return "${" if not bash else written[1:]
        names.append(name)
        default = match["rest"]
        if default is not None and not bash and default != ":-":
            odd.append(written)
        value = environment.get(name)
        if value is not None and not (value == "" and (default or "").startswith(":")):
            return value
        if default is not None:
            return default.split("-", 1)[1]
        missing.append(name)
        return written

    done = (_BASH if bash else _CE).sub(one, text)
    banned = _BANNED.search(text) if bash else None
    return Expanded(
        text=done,
        names=tuple(names),
        missing=tuple(missing),
        unbraced=tuple(unbraced),
        odd=tuple(odd),
        refused=banned[1] if banned else None,
        command=_COMMAND.search(text) is not None,
    )
