"""A recipe file as text: what may stand in one, seen before anything is built from it.

A recipe is data. It is read as plain YAML: no tags (they build Python objects), no anchors and aliases
(a few lines of them expand to gigabytes), no key by which Hydra would call something.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from apertus_nemo.errors import InputError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16

# Hydra's instantiate() calls what stands under `_target_`; the others steer that call. None has a use here.
CALLABLE_KEY = re.compile(r"_[a-z]+_")


def is_callable_key(key: object) -> bool:
    """Whether Hydra would take this key as an order to call something (`_target_`, `_partial_`, ...)."""
    return isinstance(key, str) and CALLABLE_KEY.fullmatch(key) is not None


def callable_key(value: object) -> str | None:
    """The first key, at any depth, by which Hydra would call something."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            text = getattr(key, "text", key)  # a quoted key of an override
            found = text if is_callable_key(text) else callable_key(item)
            if found is not None:
                return str(found)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return next((found for found in map(callable_key, value) if found is not None), None)
    return None


def shorten(text: str, limit: int = 120) -> str:
    """A user's text for a message: on one line, without control characters, not too long."""
    if len(text) > limit:
        text = f"{text[: limit - 20]}...{text[-10:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def where_not_yaml(label: str, error: yaml.MarkedYAMLError) -> str:
    """ "file, line 3: what is wrong"."""
    line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
    return f"{label}{line}: " + ", ".join(part for part in (error.context, error.problem) if part)


def read_recipe(path: Path, label: str) -> str:
    """The text of a recipe file; InputError, naming `label` and the line, for what does not belong into one."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{label} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{label} is larger than {MAX_BYTES} bytes, which no recipe needs")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{label} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from None
    try:
        _refuse(text, label)
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{where_not_yaml(label, error)}; this is not YAML") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{label} is not YAML: {str(error).splitlines()[0]}") from None
    return text


def _refuse(text: str, label: str) -> None:
    """Walk the parser's events: nothing is constructed."""
    # One entry an open collection: None for a list, else whether the mapping's next scalar is a key.
    open_collections: list[bool | None] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"{label}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise InputError(f"{line}: anchors and aliases are refused; write the value out, or refer to it: ${{key}}")
        if getattr(event, "tag", None) is not None:
            raise InputError(f"{line}: the YAML tag {event.tag!r} is refused; a recipe holds plain values only")
        if isinstance(event, yaml.CollectionEndEvent):
            open_collections.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        if open_collections and open_collections[-1] is not None:
            is_key = open_collections[-1]
            if is_key and isinstance(event, yaml.ScalarEvent):
                if is_callable_key(event.value):
                    raise InputError(f"{line}: {event.value} is refused; a recipe names nothing to call")
                if event.value == "hydra" and len(open_collections) == 1:
                    raise InputError(f"{line}: a recipe does not configure Hydra itself; remove the key hydra")
            open_collections[-1] = not is_key
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append(True if isinstance(event, yaml.MappingStartEvent) else None)
            if len(open_collections) > MAX_DEPTH:
                raise InputError(f"{line}: nested deeper than {MAX_DEPTH} levels, which no recipe needs")
