"""Secrets stay out of records: what looks like one is refused before anything is written.

    refuse_secrets([("optim.lr", "2e-5"), ("data.path", "https://ada:PASSWORD@host/corpus")], where="the recipe")

raises InputError, naming the key and never showing the value. A record is shared for years; a password in it cannot be
taken back, and a redacted value could not be run again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote_plus

from apertus_nemo.errors import InputError

# Last word of a key, or the name of a parameter of an URL.
_KEY = re.compile(
    r"(?:^|[._/-])(?:password|passwd|pwd|secret|token|api_?key|apikey|access_?key(?:_?id)?|secret_?access_?key|"
    r"private_?key|client_?secret|credentials?|auth|authorization|bearer|session_?token|signature|sig)\Z",
    re.IGNORECASE,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>{}\[\]]+")
# Forms that services give their keys; each has a part that says what it is.
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abposr]-[A-Za-z0-9-]{10,}|sk-[A-Za-z0-9_-]{20,}|nvapi-[A-Za-z0-9_-]{20,}|"
    r"AIza[0-9A-Za-z_-]{30,}|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def secret_in(key: str, value: Any) -> str | None:
    """What of a value looks like a secret, in a few words that do not show it; None for nothing."""
    if value is None or isinstance(value, (bool, int, float)) or value == "":
        return None
    if _KEY.search(key):
        return "the name of the key is that of a secret"
    return secret_in_text(str(value))


def secret_in_text(text: str) -> str | None:
    """As `secret_in`, of text without a key."""
    for match in _URL.finditer(text):
        parts = re.split(r"[/?#]", match[0].split("://", 1)[1], maxsplit=1)
        if "@" in parts[0]:
            return "an URL with a user's name or password"
        names = re.findall(r"[?&;#]([^=?&;#]+)=[^&;#]", match[0])
        if any(_KEY.search(unquote_plus(name)) for name in names):
            return "an URL with a key among its parameters"
    return access_key_in(text) or access_key_in(unquote_plus(text))


def access_key_in(text: str) -> str | None:
    """As `secret_in`, of source code, in which names and URLs of secrets are examples: keys of known services alone."""
    return "it has the form of an access key" if _SHAPES.search(text) else None


def refuse_secrets(values: Iterable[tuple[str, Any]], *, where: str) -> None:
    """Raise InputError for the first (key, value) that looks like a secret; the message never holds the value."""
    for key, value in values:
        found = secret_in(key, value)
        if found is not None:
            raise InputError(
                f"{key} of {where} looks like a secret ({found}): a record keeps it for ever; "
                "take it out, and let the program that needs it read it from its own place"
            )


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in nested dicts and lists."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{prefix}[{index}]")
    else:
        yield prefix, tree


def override_pairs(overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of overrides as typed; the whole text where there is no `=`."""
    for number, line in enumerate(overrides):
        key, equals, value = line.partition("=")
        yield (key.lstrip("+~"), value) if equals else (f"override {number + 1}", line)
