"""Rows of chat data: JSONL in the form of Hugging Face's `messages`, checked word for word.

    for conversation in ChatReader(source, text_key="messages"): ...

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]}

A content may also be one of the objects that the published chat template takes for text: `{"text": ...}` of the
system, `{"parts": [{"type": "text", "text": ...}]}` of the user, `{"blocks": [{"type": "response", "text": ...}]}` of
the assistant. What chat data cannot say yet (tools, thoughts, images) is refused, never left out: a model that is
trained on half of a conversation learns another one.
"""

from __future__ import annotations

from typing import Any

from apertus_nemo.data.chat_format import ROLES, Conversation, Turn
from apertus_nemo.data.sources import RowReader
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.recipe.text import shorten

KEY = "messages"

_NOTHING: tuple[Any, ...] = (None, [], {}, "")  # what a key may hold that chat data do not take

# Where the published chat template finds the text of a content that is an object: its key, and the type of its items.
_INSIDE = {"system": ("text", ""), "user": ("parts", "text"), "assistant": ("blocks", "response")}

# Roles of other formats: what to do about them.
_NO_TOOLS = "chat data cannot have tools yet: leave the row out"
_OTHER_ROLES = {
    "tool": _NO_TOOLS,
    "function": _NO_TOOLS,
    "ipython": _NO_TOOLS,
    "developer": "its block always says that deliberation and tools are disabled: take the message out if it says no "
    "more, else leave the row out",
}


class ChatReader(RowReader[Conversation]):
    """The conversations of one JSONL source, in order.

    Raises (while iterating):
        InputError: what RowReader raises, and a row that is no conversation with something to learn in it.
    """

    def _whole(self, text: str) -> Conversation:
        raise ApertusError(f"{self.source.label}: was opened as a text, and conversations are rows of JSONL")

    def _take(self, record: dict[str, Any], where: str) -> Conversation:
        place, where = f"{self.source.name}{where}", f"{self.source.label}{where}"
        messages = record[self.text_key]
        if not isinstance(messages, list):
            raise InputError(
                f"{where}: {self.text_key!r} is {type(messages).__name__}, not a list of messages: write one"
            )
        for key in ("tools", "functions"):
            if record.get(key) not in _NOTHING:
                raise InputError(f"{where}: the row declares {key}, which chat data cannot have yet: leave the row out")
        turns = tuple(self._turn(message, i, where) for i, message in enumerate(messages, start=1))
        _check_order([turn.role for turn in turns], where)
        return Conversation(turns, where, place)

    def _turn(self, message: Any, i: int, where: str) -> Turn:
        where = f"{where}: message {i}"
        if not isinstance(message, dict):
            raise InputError(f"{where} is {type(message).__name__}, not an object with role and content: write one")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"{where} {_wrong_role(message)}")
        _nothing_lost(message, ("role", "content"), where)
        content = _text(message.get("content"), role, where)
        if not content.strip():
            raise InputError(f"{where} is empty: the {role} must say something; leave the row out")
        self._check_text(content, where, "its content")
        return Turn(role, content)


def _wrong_role(message: dict[str, Any]) -> str:
    """What is wrong with a message whose role is none of ours, and what to do."""
    role = message.get("role")
    if role is None and {"from", "value"} <= message.keys():
        return "has from and value, not role and content: rename them, and human to user, gpt to assistant"
    if isinstance(role, str) and role in _OTHER_ROLES:
        return f"has the role {role!r}: {_OTHER_ROLES[role]}"
    shown = "none" if role is None else shorten(repr(role))
    return f"has the role {shown}: it must be system, user or assistant; rename it, or leave the row out"


def _text(content: Any, role: str, where: str) -> str:
    """The text of a content, as it is or as the published chat template takes it out of an object; "" of none."""
    if content is None or content == []:
        return ""
    if isinstance(content, str):
        return content
    key, kind = _INSIDE[role]
    if isinstance(content, list):
        raise InputError(
            f"{where}: its content is a list: write its texts as one text; a row with images or sound must be left out"
        )
    if not isinstance(content, dict) or key not in content:
        raise InputError(
            f"{where}: its content is {type(content).__name__}, not text: write a text, or as the {role}'s an object "
            f"with {key!r}"
        )
    _nothing_lost(content, (key,), f"{where}: its content")
    if not kind:
        return _words(content[key], f"{where}: {key!r} of its content")
    if not isinstance(content[key], list):
        raise InputError(f"{where}: {key!r} of its content is {type(content[key]).__name__}, not a list: write a list")
    texts = []
    for i, item in enumerate(content[key], start=1):
        inside = f"{where}: item {i} of {key!r}"
        if not isinstance(item, dict):
            raise InputError(f"{inside} is {type(item).__name__}, not an object with type and text: write one")
        if item.get("type") != kind:
            shown = "none" if item.get("type") is None else shorten(repr(item["type"]))
            raise InputError(f"{inside} has the type {shown}: chat data can have {kind!r} alone yet: leave the row out")
        _nothing_lost(item, ("type", "text"), inside)
        texts.append(_words(item.get("text"), f"{inside}: its text"))
    return "".join(texts)


def _words(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{what} is {type(value).__name__}, not text: write a text")
    return value


def _nothing_lost(found: dict[str, Any], keys: tuple[str, ...], what: str) -> None:
    for key, value in found.items():
        if key not in keys and value not in _NOTHING:
            raise InputError(
                f"{what} has the key {shorten(repr(key))}, which would be lost: "
                "take it out if it does not matter, else leave the row out"
            )


def _check_order(roles: list[str], where: str) -> None:
    """A system turn or none, then user and assistant in turn; the last is the assistant's, since only it is learned."""
    rest = roles[1:] if roles[:1] == ["system"] else roles
    if not rest:
        what = "only a system turn" if roles else "no turn"
        raise InputError(f"{where}: the conversation has {what}: there is nothing to learn; leave it out")
    first = len(roles) - len(rest) + 1
    for i, role in enumerate(rest):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise InputError(
                f"{where}: message {first + i} is the {role}'s, and it is the turn of the {expected}: "
                "after a system turn, if any, user and assistant take turns; reorder the row, or leave it out"
            )
    if rest[-1] != "assistant":
        raise InputError(
            f"{where}: the last turn is the user's, and only the assistant's are learned: "
            "take it out, or leave the row out"
        )
