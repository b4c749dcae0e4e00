"""The embedded conversations: small ones, made by arithmetic from their numbers, for the CPU twins of fine-tuning.

    lines = examples()          # JSONL, one conversation a line, in the form that `data build --format chat` reads
    files = chat_tokenizer(folder)

Sums, spelling, words backwards, and the order of numbers and days, in English and German; one to three questions each;
a third has a system turn of its own. They teach a small model the form of a chat, not knowledge.
"""

from __future__ import annotations

import json
from pathlib import Path

from apertus_nemo.data.chat_format import TOKENS

CONVERSATIONS = 768
DATE = "2025-09-02"  # of the default system turn; any would do, today's would not

# Those of the format, and those that the published tokenizer has beside them.
CHAT_TOKENS = (*TOKENS, "<|inner_prefix|>", "<|inner_suffix|>", "<|tools_prefix|>", "<|tools_suffix|>")

_WORDS = (
    "snow", "lake", "train", "bridge", "valley", "cheese", "clock", "forest", "harbour", "garden", "window", "letter",
    "river", "market", "summer", "lantern", "violin", "pocket", "mirror", "candle", "orchard", "thunder", "saddle",
)  # fmt: skip
_DAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "de": ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
}
_SYSTEM = {"en": "You answer briefly and in English.", "de": "Du antwortest kurz und auf Deutsch."}


def examples(count: int = CONVERSATIONS) -> bytes:
    """The first `count` conversations as JSONL: the same bytes everywhere."""
    lines = [json.dumps({"messages": _messages(i)}, ensure_ascii=False) + "\n" for i in range(count)]
    return "".join(lines).encode()


def _messages(number: int) -> list[dict[str, str]]:
    language = ("en", "de")[number % 2]
    messages = [{"role": "system", "content": _SYSTEM[language]}] if number % 3 == 0 else []
    for turn in range(1 + number % 4 % 3):
        question, answer = _exchange(number * 7 + turn * 13, language)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _exchange(n: int, language: str) -> tuple[str, str]:
    """Question and answer of a number."""
    a, b, word, day = 11 + n * 29 % 67, 3 + n * 17 % 41, _WORDS[n % len(_WORDS)], n // 5 % 7
    days = _DAYS[language]
    english = (
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
        (f"Spell the word {word}.", f"{'-'.join(word.upper())}."),
        (f"What is {word} backwards?", f"It is {word[::-1]}."),
        (f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger." if a != b else "They are equal."),
        (f"Which day comes after {days[day]}?", f"{days[(day + 1) % 7]}."),
    )
    german = (
        (f"Was ist {a} plus {b}?", f"{a} plus {b} ist {a + b}."),
        (f"Buchstabiere das Wort {word}.", f"{'-'.join(word.upper())}."),
        (f"Wie heisst {word} rückwärts?", f"Es heisst {word[::-1]}."),
        (f"Was ist grösser, {a} oder {b}?", f"{max(a, b)} ist grösser." if a != b else "Sie sind gleich."),
        (f"Welcher Tag kommt nach {days[day]}?", f"{days[(day + 1) % 7]}."),
    )
    return (english if language == "en" else german)[n % 5]


def chat_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of a trained tokenizer whose last merges have made room for the chat tokens.

    The size of the vocabulary stays, and so does every other id: a model that was trained with the tokenizer in
    `folder` can be tuned with this one. The tokens that go are the rarest.
    """
    tree = json.loads((folder / "tokenizer.json").read_bytes())
    model, room = tree["model"], len(CHAT_TOKENS)
    by_id = sorted(model["vocab"], key=lambda token: int(model["vocab"][token]))
    first = len(by_id) - room
    model["vocab"] = {token: i for i, token in enumerate(by_id[:first])}
    model["merges"] = model["merges"][:-room]
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    for i, token in enumerate(CHAT_TOKENS):
        tree["added_tokens"].append({"id": first + i, "content": token, "special": True, **flags})
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    config["eos_token"] = "<|assistant_end|>"
    return {
        "tokenizer.json": json.dumps(tree, ensure_ascii=False, indent=2).encode() + b"\n",
        "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
    }
