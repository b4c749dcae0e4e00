"""Canonical JSON (RFC 8785), SHA-256 over it, and exact text for floats and 64-bit words.

    data = dumps({"loss": hex_float(2.5), "lane": hex_word(2**63)})
    sha256_hex(data)
    loads(data, what="lock.json")

JSON numbers are doubles: an integer beyond 2^53 - 1 is refused, so 64-bit words and measured floats
travel as hex strings. Numbers that a person chose (a learning rate in a recipe) stay numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, NoReturn

from apertus_nemo.errors import ApertusError, InputError

MAX_BYTES = 64 * 2**20  # largest JSON file that is read
MAX_DEPTH = 64  # deepest nesting that is read
MAX_INTEGER = 2**53 - 1  # RFC 8785: integers that a double holds exactly

_WORD = re.compile(r"[0-9a-f]{16}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_KEPT_FLOAT = re.compile(r'"\\u0000([^"]*)"')


def dumps(value: Any) -> bytes:
    """`value` (dicts with string keys, lists, strings, numbers, booleans, None) as canonical JSON.

    Raises ApertusError for what JSON cannot hold: NaN, infinities, integers beyond 2^53 - 1, other types.
    """
    import rfc8785

    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise ApertusError(f"cannot be written as canonical JSON: {error}") from error


def sha256_hex(data: bytes) -> str:
    """SHA-256 as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def is_digest(text: object) -> bool:
    """Whether `text` is a SHA-256 as `sha256_hex` writes it."""
    return isinstance(text, str) and _DIGEST.match(text) is not None


def loads(data: bytes, *, what: str, max_bytes: int = MAX_BYTES) -> Any:
    """Parse JSON strictly.

    Raises InputError, beginning with `what`, for duplicate keys, NaN and infinities (also 1e999), integers
    beyond 2^53 - 1 (but for the digits that RFC 8785 writes of a large double), nesting deeper than MAX_DEPTH, more
    than `max_bytes`, invalid UTF-8 and anything after the value.
    """
    return _loads(data, what, max_bytes)[0]


def _loads(data: bytes, what: str, max_bytes: int) -> tuple[Any, bool]:
    """(value, whether every float in it is written as RFC 8785 would)."""
    floats = True

    def refuse(reason: str) -> NoReturn:
        raise InputError(f"{what}: {reason}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            refuse(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
        return result

    def integer(text: str) -> int | float:
        value = int(text) if len(text) < 24 else 2**64
        if abs(value) <= MAX_INTEGER:
            return value
        if dumps(double := float(value)) == text.encode():
            return double  # a large double, which RFC 8785 writes without a point
        refuse(f"integer {text[:24]} is beyond 2^53 - 1")

    def real(text: str) -> float:
        nonlocal floats
        value = float(text)
        if not math.isfinite(value):
            refuse(f"number {text[:24]} is not finite")
        floats = floats and dumps(value) == text.encode()
        return value

    def constant(text: str) -> NoReturn:
        refuse(f"{text} is not JSON")

    if len(data) > max_bytes:
        refuse(f"has {len(data)} bytes, more than the {max_bytes} that are read")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_int=integer,
            parse_float=real,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        refuse(f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})")
    except RecursionError:
        refuse(f"is nested deeper than {MAX_DEPTH} levels")
    if _too_deep(value):
        refuse(f"is nested deeper than {MAX_DEPTH} levels")
    return value, floats


def loads_canonical(data: bytes, *, what: str, max_bytes: int = MAX_BYTES) -> Any:
    """As `loads`, and refuses anything but the canonical form, so that equal values have equal bytes."""
    value, floats = _loads(data, what, max_bytes)
    if floats and data.isascii() and _quick(data, value) == data:
        return value
    try:
        canonical = dumps(value)
    except ApertusError as error:
        raise InputError(f"{what}: {error}") from error
    if canonical != data:
        raise InputError(f"{what}: is not canonical JSON (RFC 8785): it was changed after it was written")
    return value


def _quick(data: bytes, value: Any) -> bytes:
    """The canonical form of `data`, which holds `value`, if all is ASCII and its floats are canonical; fast.

    Of ASCII, the standard library writes RFC 8785 but for floats; those are kept as they stand.
    """
    if b"." in data or b"e-" in data:
        value = json.loads(data, parse_float=lambda text: f"\0{text}")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _KEPT_FLOAT.sub(r"\1", text).encode("utf-8", "replace")


def _too_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
    return bool(level)


def hex_float(value: float) -> str:
    """A float exactly, as C99 hex ("0x1.8000000000000p+1"); "nan" (payload and sign are not kept), "inf", "-inf"."""
    return float(value).hex()


def from_hex_float(text: str, *, what: str = "hex float") -> float:
    """The inverse of `hex_float`; raises InputError for any other spelling."""
    try:
        value = float.fromhex(text)
    except (ValueError, OverflowError, TypeError):
        value = math.nan
    if not isinstance(text, str) or value.hex() != text:
        raise InputError(f"{what}: {text!r} is not a float in hex as this record writes it")
    return value


def hex_word(value: int) -> str:
    """An unsigned 64-bit integer as 16 lower-case hex digits."""
    if not 0 <= value < 2**64:
        raise ApertusError(f"{value} is not an unsigned 64-bit integer")
    return f"{value:016x}"


def from_hex_word(text: object, *, what: str = "64-bit word") -> int:
    """The inverse of `hex_word`; raises InputError for any other spelling."""
    if not isinstance(text, str) or _WORD.match(text) is None:
        raise InputError(f"{what}: {text!r} is not 16 lower-case hex digits")
    return int(text, 16)


def unknown(reason: str) -> dict[str, str]:
    """How a record writes a value that cannot be known: never left out, always with the reason."""
    return {"unknown": reason}


def is_unknown(value: object) -> bool:
    """Whether `value` was written by `unknown`."""
    return isinstance(value, dict) and set(value) == {"unknown"} and isinstance(value["unknown"], str)
