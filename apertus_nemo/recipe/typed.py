"""A plain tree (of YAML or JSON) as a RunConfig: strict in keys, types and ranges, with every fault named.

    config = from_tree(tree)            # InputError lists all faults, one a line
    assert to_tree(config) == tree      # the inverse of schema.to_tree

An integer is taken where a float is asked for (and becomes one); nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.recipe import schema
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.suggest import nearest
from apertus_nemo.recipe.text import shorten
from apertus_nemo.recipe.time_limit import time_limit_s
from apertus_nemo.recipe.values import ALLOWED

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_MAX_TEXT = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_BELOW = re.compile(rf"{_NAME.pattern}(/{_NAME.pattern}){{0,9}}")
_FORMS = {"name": _NAME, "data.stages.name": _NAME, "data.stages.mixture.source": _BELOW}  # texts that become names


class _Bad:
    """In the place of a value that was refused."""


_BAD = _Bad()


@cache
def fields_of(cls: Any) -> dict[str, Any]:
    """Field name -> resolved type of a dataclass of the schema."""
    hints = typing.get_type_hints(cls, vars(schema))
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def _optional(cls: Any) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(cls) if f.metadata.get("optional"))


@cache
def leaf_keys() -> tuple[str, ...]:
    """Every dotted key of a recipe that holds a value; a list counts as one value."""
    return tuple(_leaves(RunConfig, ""))


def _leaves(cls: Any, prefix: str) -> list[str]:
    found: list[str] = []
    for name, kind in fields_of(cls).items():
        nested = dataclasses.is_dataclass(kind) and isinstance(kind, type)
        found += _leaves(kind, f"{prefix}{name}.") if nested else [prefix + name]
    return found


@cache
def list_keys() -> tuple[str, ...]:
    """The keys that hold lists, those inside the items of a list too, as `rule_key` writes them."""

    def found(cls: Any, prefix: str) -> list[str]:
        keys: list[str] = []
        for name, kind in fields_of(cls).items():
            is_list = typing.get_origin(kind) is tuple
            inner = typing.get_args(kind)[0] if is_list else kind
            keys += [prefix + name] if is_list else []
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                keys += found(inner, f"{prefix}{name}.")
        return keys

    return tuple(found(RunConfig, ""))


@cache
def sections() -> tuple[str, ...]:
    """The dotted keys that hold other keys."""
    return tuple(sorted({key.rsplit(".", 1)[0] for key in leaf_keys() if "." in key}))


def defaults() -> dict[str, Any]:
    """The schema's defaults as a tree; "???" (OmegaConf's mark) where there is none."""

    def tree(cls: Any) -> dict[str, Any]:
        kinds = fields_of(cls)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            kind = kinds[field.name]
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                values[field.name] = tree(kind)
            elif field.default is dataclasses.MISSING:
                values[field.name] = "???"
            else:
                values[field.name] = schema.to_tree(field.default)
        return values

    return tree(RunConfig)


def show_value(value: object) -> str:
    """A value as a recipe would write it, on one line, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return f"an integer of {value.bit_length()} bits"
    text = '"' + value.encode("unicode_escape").decode() + '"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:70] + "..." + text[-5:]


def from_tree(tree: object, *, where: Mapping[str, str] | None = None) -> RunConfig:
    """The RunConfig that a tree describes; every field must be there but those marked `schema.OPTIONAL`.

    `where` says where a dotted key's value came from, for the messages. Raises InputError.
    """
    faults: list[str] = []
    config = _dataclass(RunConfig, tree, "", where or {}, faults)
    if faults:
        raise InputError("\n".join(faults))
    assert isinstance(config, RunConfig)
    return config


def _origin(key: str, where: Mapping[str, str]) -> str:
    probe = key
    while probe:
        if probe in where:
            return f" ({shorten(where[probe])})"
        probe = probe.rpartition(".")[0]
    return ""


def unknown_key(key: str, origin: str = "") -> str:
    """The message for a key that no recipe has."""
    found = nearest(rule_key(key), {*ALLOWED, *leaf_keys()})
    hint = f"; did you mean {found}?" if found else "; `apertus-nemo show` prints all keys"
    return f"{shorten(key)}{origin} is not a key of a recipe{hint}"


def _dataclass(cls: Any, tree: object, key: str, where: Mapping[str, str], faults: list[str]) -> Any:
    if not isinstance(tree, Mapping):
        section = key or "the recipe"
        faults.append(f"{section} is {show_value(tree)}{_origin(key, where)} and must be a mapping of keys to values")
        return _BAD
    prefix = f"{key}." if key else ""
    kinds = fields_of(cls)
    before = len(faults)
    for name in tree:
        if name not in kinds:
            faults.append(unknown_key(f"{prefix}{name}", _origin(f"{prefix}{name}", where)))
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in tree and name in _optional(cls):
            continue
        if name not in tree or tree[name] == "???":
            faults.append(f"{prefix}{name} has no value; {_demand(rule_key(prefix + name), kind)}")
            continue
        values[name] = _value(kind, tree[name], prefix + name, where, faults)
    return cls(**values) if len(faults) == before else _BAD


def rule_key(key: str) -> str:
    """The key in the table of allowed values: list indices left out."""
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def _demand(row: str, kind: Any) -> str:
    """What a value must be, and why."""
    optional = types.NoneType in typing.get_args(kind)
    kind = _plain(kind)
    if dataclasses.is_dataclass(kind):
        return "it must be a mapping of keys to values"
    if typing.get_origin(kind) is tuple:
        return "it must be a list"
    rule = ALLOWED[row]
    words = rule.describe() if rule.choices else f"{_WORDS[kind]} {rule.describe()}".rstrip()
    return f"it must be {words}{' or null' if optional else ''}: {rule.reason}"


def _plain(kind: Any) -> Any:
    """A type without its `| None`."""
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def _value(kind: Any, value: object, key: str, where: Mapping[str, str], faults: list[str]) -> Any:
    if value is None and types.NoneType in typing.get_args(kind):
        return None
    plain = _plain(kind)
    if dataclasses.is_dataclass(plain) and isinstance(plain, type):
        return _dataclass(plain, value, key, where, faults)
    if typing.get_origin(plain) is tuple:
        item_kind = typing.get_args(plain)[0]
        if not isinstance(value, (list, tuple)):
            faults.append(f"{key} is {show_value(value)}{_origin(key, where)} and must be a list")
            return _BAD
        return tuple(_value(item_kind, item, f"{key}.{i}", where, faults) for i, item in enumerate(value))
    row = rule_key(key)
    converted = _scalar(plain, value, row)
    if converted is _BAD or not ALLOWED[row].admits(converted):
        demand = _demand(row, kind)
        faults.append(f"{key} is {show_value(value)}{_origin(key, where)}; {demand}")
        return _BAD
    return converted


def _scalar(kind: type, value: object, row: str) -> Any:
    """The value as `kind`, or _BAD. A bool is not a number; NaN and infinities are refused."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 1 << 53:
            return _BAD
        value = float(value)
    if type(value) is not kind:
        return _BAD
    if isinstance(value, float) and not math.isfinite(value):
        return _BAD
    if isinstance(value, str) and not _is_good_text(value, row):
        return _BAD
    return value


def _is_good_text(value: str, row: str) -> bool:
    if row in _FORMS:
        return _FORMS[row].fullmatch(value) is not None
    if row == "trainer.max_time":
        return time_limit_s(value) is not None
    return 0 < len(value) <= _MAX_TEXT and value.isprintable()
