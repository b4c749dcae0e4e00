"""Rows of chat data: JSONL in the form of Hugging Face's `messages`, checked word for word.

    for conversation in ChatReader(source, text_key="messages"): ...

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]}

What chat data cannot say yet (tools, thoughts, images) is refused, never left out: a model that is trained on half of
a conversation learns another one.
"""

from __future__ import annotations

from typing import Any

from apertus_nemo.data.chat_format import ROLES, Conversation, Turn
from apertus_nemo.data.sources import RowReader
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.recipe.text import shorten

KEY = "messages"


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
            raise InputError(f"{where}: {self.text_key!r} is {type(messages).__name__}, not a list of messages")
        if record.get("tools"):
            raise InputError(f"{where}: the row declares tools, which chat data cannot have yet: leave the row out")
        turns = tuple(self._turn(message, i, where) for i, message in enumerate(messages, start=1))
        _check_order([turn.role for turn in turns], where)
        return Conversation(turns, where, place)

    def _turn(self, message: Any, i: int, where: str) -> Turn:
        where = f"{where}: message {i}"
        if not isinstance(message, dict):
            raise InputError(f"{where} is {type(message).__name__}, not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            shown = "none" if role is None else shorten(repr(role))
            raise InputError(f"{where} has the role {shown}: it must be system, user or assistant")
        for key, value in message.items():
            if key not in ("role", "content") and value not in (None, [], {}, ""):
                raise InputError(
                    f"{where} has the key {shorten(repr(key))}, which would be lost: chat data take a role and a text"
                )
        if content is None or content == []:
            content = ""
        if not isinstance(content, str):
            raise InputError(f"{where}: its content is {type(content).__name__}, not text")
        if not content.strip():
            raise InputError(f"{where} is empty: the {role} must say something")
        self._check_text(content, where, "its content")
        return Turn(role, content)


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
                "after a system turn, if any, user and assistant take turns"
            )
    if rest[-1] != "assistant":
        raise InputError(f"{where}: the last turn is the user's: a conversation ends with the assistant's")
