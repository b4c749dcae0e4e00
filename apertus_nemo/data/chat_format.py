"""The Apertus chat format: conversations as token ids, and which of them the loss sees.

    encoder = ChatEncoder(tokenizer, date="2025-09-02")
    [ids] = encoder.encode([conversation])
    trained(ids, start=67, end=68)          # one flag a token: whether it is a label of the loss

    <s><|system_start|>...<|system_end|><|developer_start|>...<|developer_end|>
       <|user_start|>...<|user_end|><|assistant_start|>...<|assistant_end|>...

The format is that of the published tokenizer's chat template (swiss-ai/apertus-format) for text: without a system
turn there is a default one, which names a date; a developer block says that deliberation and tools are off. Two things
are decided here. The date is given, never today's, since the same input must give the same bytes. Every assistant turn
ends with `<|assistant_end|>`, the last one too: it is the published end-of-sequence token of the tuned models (id 68).

The tokens of the format come from this module alone: what a turn says is encoded as text, so a conversation that quotes
`<|assistant_start|>` gets the characters, not the token.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from apertus_nemo.data.manifest import ChatInfo, TokenizerInfo
from apertus_nemo.data.tokenizer import CorpusTokenizer
from apertus_nemo.errors import InputError

FORMAT = "apertus"
ROLES = ("system", "user", "assistant")
TOKENS = tuple(f"<|{role}_{end}|>" for role in ("system", "developer", "user", "assistant") for end in ("start", "end"))
DEFAULT_SYSTEM = (
    "You are Apertus, a helpful assistant created by the SwissAI initiative.\nKnowledge cutoff: 2024-04\n"
    "Current date: {date}"
)
DEVELOPER = "Deliberation: disabled\nTool Capabilities: disabled"


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """The turns of one row: a system turn or none, then user and assistant in turn, the assistant last."""

    turns: tuple[Turn, ...]
    where: str  # file and line, for messages
    place: str  # the same by the name in the manifest

    def __len__(self) -> int:
        """Characters, at least one."""
        return sum(len(turn.content) for turn in self.turns)


def check_date(text: str) -> str:
    """A date as the default system turn names it; raises InputError for anything but YYYY-MM-DD."""
    try:
        good = datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        good = False
    if not good:
        raise InputError(f"--date is {text!r}: it must be a date as 2025-09-02")
    return text


class ChatEncoder:
    """Encodes conversations, and counts what the manifest says of them."""

    def __init__(
        self,
        tokenizer: CorpusTokenizer,
        *,
        of: str = "the tokenizer",
        date: str | None = None,
        max_tokens: int | None = None,
        drop_longer: bool = False,
    ) -> None:
        """`of` names the tokenizer in messages. Longer conversations than `max_tokens` are refused, or left out.

        Raises InputError where the tokenizer lacks a token of the format.
        """
        self._engine, self._tokenizer = tokenizer.engine, tokenizer.info
        self._bos = tokenizer.info.bos_id
        ids = {token: self._engine.token_to_id(token) for token in TOKENS}
        missing = [token for token, number in ids.items() if number is None]
        if missing:
            raise InputError(
                f"{of}: the tokenizer has no token {missing[0]}{_and_others(missing)}: chat needs a tokenizer with the "
                "chat tokens, as the published Apertus tokenizer has them"
            )
        self.ids: dict[str, int] = {token: int(number) for token, number in ids.items()}
        self._date = None if date is None else check_date(date)
        self._max_tokens, self._drop = max_tokens, drop_longer
        self._default_systems = self._dropped = self._longest = self._trained = 0
        self._longest_at = ""

    def encode(self, conversations: list[Conversation]) -> list[list[int]]:
        """Ids of each conversation, without those that are left out."""
        blocks = [self._blocks(conversation) for conversation in conversations]
        texts = [text for conversation in blocks for _, text in conversation]
        encoded = iter(self._engine.encode_batch_fast(texts, add_special_tokens=False))
        found = []
        for conversation, rows in zip(conversations, blocks, strict=True):
            ids = [self._bos]
            for role, _ in rows:
                content = next(encoded).ids
                self._refuse_tokens(content, conversation)
                ids += [self.ids[f"<|{role}_start|>"], *content, self.ids[f"<|{role}_end|>"]]
            if self._fits(ids, conversation):
                found.append(ids)
                self._default_systems += conversation.turns[0].role != "system"
        return found

    @property
    def tokenizer_info(self) -> TokenizerInfo:
        """The tokenizer, with the token that ends a conversation in the place of the one that ends a document."""
        return dataclasses.replace(self._tokenizer, eos_id=self.ids["<|assistant_end|>"])

    @property
    def info(self) -> ChatInfo:
        """What is known of the conversations encoded so far."""
        return ChatInfo(
            format=FORMAT,
            assistant_start_id=self.ids["<|assistant_start|>"],
            assistant_end_id=self.ids["<|assistant_end|>"],
            date=self._date,
            default_systems=self._default_systems,
            max_tokens=self._max_tokens,
            dropped=self._dropped,
            longest_tokens=self._longest,
            longest_at=self._longest_at,
            trained_tokens=self._trained,
        )

    def _blocks(self, conversation: Conversation) -> list[tuple[str, str]]:
        """(role, text) of each block: a system turn, the developer's, then the others."""
        turns = conversation.turns
        if turns[0].role == "system":
            system, rest = turns[0].content, turns[1:]
        elif self._date is None:
            raise InputError(
                f"{conversation.where}: the conversation has no system turn, and the default one names a date: "
                "give the date with --date, or the conversation a system turn"
            )
        else:
            system, rest = DEFAULT_SYSTEM.format(date=self._date), turns
        return [("system", system), ("developer", DEVELOPER), *((turn.role, turn.content) for turn in rest)]

    def _refuse_tokens(self, content: Sequence[int], conversation: Conversation) -> None:
        """A tokenizer that does not mark its chat tokens as special reads them from text."""
        for token, number in self.ids.items():
            if number in content:
                raise InputError(
                    f"{conversation.where}: a turn holds the text {token}, which the tokenizer takes for its token: "
                    "mark it as special in tokenizer.json, or take the text out"
                )

    def _fits(self, ids: list[int], conversation: Conversation) -> bool:
        if self._max_tokens is not None and len(ids) > self._max_tokens:
            if not self._drop:
                raise InputError(
                    f"{conversation.where}: the conversation has {len(ids)} tokens, and --max-tokens is "
                    f"{self._max_tokens}: shorten it, or leave such ones out with --drop-longer"
                )
            self._dropped += 1
            return False
        if len(ids) > self._longest:
            self._longest, self._longest_at = len(ids), conversation.place
        self._trained += sum(trained(ids, start=self.ids["<|assistant_start|>"], end=self.ids["<|assistant_end|>"]))
        return True


def trained(ids: Sequence[int], *, start: int, end: int) -> list[bool]:
    """Whether each token is a label of the loss: what an assistant turn says, and the token that ends it.

    The token that begins the turn is given to the model, as at inference, and so is no label.
    """
    inside, flags = False, []
    for token in ids:
        flags.append(inside)
        inside = (inside or token == start) and token != end
    return flags


def _and_others(missing: list[str]) -> str:
    others = len(missing) - 1
    return f" (nor {others} {'other' if others == 1 else 'others'} of the format)" if others else ""
