"""What a container gets from an EDF, and where each value comes from.

    for entry in effective(document, view).entries: ...

Values of secrets are never shown, wherever they come from. What the image's own environment adds is not known here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from apertus_nemo.edf.check import View
from apertus_nemo.edf.dialects import Dialect
from apertus_nemo.edf.document import Document
from apertus_nemo.edf.expand import expand
from apertus_nemo.edf.finding import Fault, printable
from apertus_nemo.edf.inherit import SINGLE, Merged, Origin, Value, load_chain, merge
from apertus_nemo.edf.rules_variables import is_secret
from apertus_nemo.edf.settings import BY_NAME, HOOK_SETS, SOURCES

MASK = "***"


@dataclass(frozen=True)
class Entry:
    """One value that results."""

    key: str  # "image", "mounts[0]", "env.NCCL_NET", "annotations.com.hooks.cxi.enabled"
    value: Any  # expanded; MASK for a secret
    origin: Origin | None  # None: the engine's default
    replaced: tuple[Origin, ...]
    undefined: tuple[str, ...]  # variables in it that are not set here
    remark: str = ""

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        origin = None if self.origin is None else _tree(self.origin)
        return {
            "key": self.key,
            "value": self.value,
            "origin": origin,
            "replaced": [_tree(origin) for origin in self.replaced],
            "undefined": list(self.undefined),
            "remark": self.remark,
        }


def _tree(origin: Origin) -> dict[str, Any]:
    return {"file": origin.file, "line": origin.line, "via": list(origin.via)}


@dataclass(frozen=True)
class Effective:
    """All entries, and what the hook for NCCL is documented to add."""

    file: str
    entries: tuple[Entry, ...]
    added: dict[str, str]

    def text(self) -> str:
        """Lines, each value with its place."""
        shown = [(entry, f"{printable(entry.key)} = {_value(entry.value)}") for entry in self.entries]
        width = min(max((len(line) for _, line in shown), default=0), 78)
        lines = []
        for entry, line in shown:
            place = "default of the engine" if entry.origin is None else printable(str(entry.origin))
            notes = [entry.remark] if entry.remark else []
            if entry.replaced:
                notes.append("instead of " + ", ".join(printable(f"{o.file}:{o.line}") for o in entry.replaced))
            if entry.undefined:
                notes.append("not set here: " + ", ".join(entry.undefined))
            lines.append(f"{line:{width}}  # {'; '.join([place, *notes])}")
        if self.added:
            lines += ["", f"# What the {SOURCES['hook'].split(':')[0]} is documented to set beside these:"]
            lines += [f"# env.{key} = {_value(value)}" for key, value in self.added.items()]
        lines += [
            "",
            "# The image's own variables are not known here; those of [env] win over them, and they over the host's.",
        ]
        return "\n".join(lines) + "\n"

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return {"file": self.file, "entries": [entry.tree() for entry in self.entries], "added_by_hook": self.added}


def effective(document: Document, view: View) -> Effective:
    """What results from a document. Raises Fault where a base cannot be read."""
    lookup = view.lookup()
    chain = load_chain(document, lookup)
    if chain.faults:
        raise Fault(chain.faults[0])
    merged = merge(chain.links)
    entries: list[Entry] = []
    for key in SINGLE:
        if key in merged.single:
            entries.append(_entry(key, merged.single[key], view, expanded=key != "image" or view.dialect.expands_image))
        elif (default := _default(key, view.dialect)) is not None:
            entries.append(Entry(key, default[0], None, (), (), default[1]))
    for name, values in (("mounts", merged.mounts), ("devices", merged.devices)):
        entries += [_entry(f"{name}[{index}]", value, view) for index, value in enumerate(values)]
    for table, mapping in (("env", merged.env), ("annotations", merged.annotations)):
        entries += [_entry(f"{table}.{key}", mapping[key], view) for key in sorted(mapping)]
    return Effective(document.name, tuple(entries), _added(merged, view))


def _entry(key: str, value: Value, view: View, *, expanded: bool = True) -> Entry:
    name = key.partition(".")[2] or key
    if not isinstance(value.value, str):
        return Entry(
            key, _plain(value.value), value.origin, value.replaced, (), "" if key in SINGLE else "not a string"
        )
    result = expand(value.value, view.environment, view.dialect)
    text = result.text if expanded else value.value
    table = key.partition(".")[0]
    secret = table in ("env", "annotations") and "ssh" not in name and is_secret(name, text)
    secret = secret or any(is_secret(used) for used in result.names) or is_secret("", text)
    remark = (
        "unset in the container" if key.startswith("env.") and text == "" and not view.dialect.bash_variables else ""
    )
    return Entry(key, MASK if secret and text else text, value.origin, value.replaced, result.missing, remark)


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, (bool, int)):
        return value if isinstance(value, bool) or abs(value) < 2**63 else str(hex(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value)


def _default(key: str, dialect: Dialect) -> tuple[Any, str] | None:
    if key == "writable":
        return True, ""
    if key == "entrypoint":
        default = dialect.entrypoint_default
        return (default, "") if default is not None else ("unknown", "documented false, true in the code")
    return None


def _added(merged: Merged, view: View) -> dict[str, str]:
    if view.dialect.bash_variables or merged.annotation("com.hooks.aws_ofi_nccl.enabled") != "true":
        return {}
    return {name: BY_NAME[name].value or "" for name in sorted(HOOK_SETS) if name not in merged.env}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = printable(str(value))
    return text if re.fullmatch(r"-?\d+", text) and isinstance(value, int) else f'"{text}"'
