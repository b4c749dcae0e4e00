"""Rows of chat data that are refused, word for word, and built corpora of those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.data import manifest as manifests
from apertus_nemo.data.chat_format import DEFAULT_SYSTEM, Turn
from apertus_nemo.data.chat_rows import ChatReader
from apertus_nemo.data.sources import find
from apertus_nemo.errors import Differs, InputError
from apertus_nemo.testing.ranks import Parent
from tests.unit.data.chats import chat, ids_of, write_tokenizer
from tests.unit.data.conftest import Command

GOOD = chat("user: Hi", "assistant: Ho")


def refused(folder: Path, line: str) -> str:
    """The message for the second line of a file, without the file's name."""
    path = folder / "chat.jsonl"
    path.write_text(json.dumps({"messages": GOOD}) + "\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        list(ChatReader(find([str(path)])[0], text_key="messages"))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    return str(caught.value).removeprefix(f"{path}, line 2: ")


TURNS = "after a system turn, if any, user and assistant take turns"
MESSAGES: list[tuple[Any, str]] = [
    (chat("tool: 42", *["assistant: a"]), "message 1 has the role 'tool': it must be system, user or assistant"),
    (chat("User: a", "assistant: a"), "message 1 has the role 'User': it must be system, user or assistant"),
    ([{"content": "a"}], "message 1 has the role none: it must be system, user or assistant"),
    (
        [{"role": "\x1b[31m" + "x" * 200, "content": "a"}],
        r"message 1 has the role '\x1b[31m" + "x" * 91 + "..." + "x" * 9 + "': it must be system, user or assistant",
    ),
    (chat("user: a", "assistant:  \n"), "message 2 is empty: the assistant must say something"),
    ([{"role": "user", "content": None}, GOOD[1]], "message 1 is empty: the user must say something"),
    ([{"role": "user"}, GOOD[1]], "message 1 is empty: the user must say something"),
    (chat("system: a"), "the conversation has only a system turn: there is nothing to learn; leave it out"),
    ([], "the conversation has no turn: there is nothing to learn; leave it out"),
    (chat("user: a"), "the last turn is the user's: a conversation ends with the assistant's"),
    (
        chat("system: s", "user: a", "assistant: b", "user: c"),
        "the last turn is the user's: a conversation ends with the assistant's",
    ),
    (
        chat("assistant: a"),
        "message 1 is the assistant's, and it is the turn of the user: {turns}",
    ),
    (
        chat("system: s", "user: a", "user: b", "assistant: c"),
        "message 3 is the user's, and it is the turn of the assistant: {turns}",
    ),
    (
        chat("user: a", "system: s", "assistant: c"),
        "message 2 is the system's, and it is the turn of the assistant: {turns}",
    ),
    (["Hi"], "message 1 is str, not an object with role and content"),
    ("Hi", "'messages' is str, not a list of messages"),
    ([{"role": "user", "content": [{"type": "text"}]}, GOOD[1]], "message 1: its content is list, not text"),
    (
        [GOOD[0], {**GOOD[1], "tool_calls": [{"id": "1"}]}],
        "message 2 has the key 'tool_calls', which would be lost: chat data take a role and a text",
    ),
    (
        [GOOD[0], {**GOOD[1], "content": "\ud800"}],
        "message 2: its content holds half of a surrogate pair: repair the line",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "message"), MESSAGES)
def test_messages_that_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    assert refused(tmp_path, json.dumps({"messages": messages})) == message.replace("{turns}", TURNS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not JSON (Expecting value): every line must be one JSON object"),
        ("[]", "not a JSON object: every line must be one JSON object"),
        ('{"text": "a"}', "no key 'messages': name the right one with --text-key"),
        (
            json.dumps({"messages": GOOD, "tools": [{"name": "f"}]}),
            "the row declares tools, which chat data cannot have yet: leave the row out",
        ),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    assert refused(tmp_path, line) == message


def test_a_row_keeps_what_it_says(tmp_path: Path) -> None:
    row = [{**GOOD[0], "name": None, "tool_calls": []}, {"content": " Ho\n", "role": "assistant"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 7, "tools": [], "messages": row}))
    [found] = ChatReader(find([str(tmp_path / "a.jsonl")])[0], text_key="messages")
    assert found.turns == (Turn("user", "Hi"), Turn("assistant", " Ho\n"))
    assert (found.where, found.place) == (f"{tmp_path / 'a.jsonl'}, line 1", "a.jsonl, line 1")


DEVELOPER = [63, *ids_of("Deliberation: disabled\nTool Capabilities: disabled"), 64]
DEFAULT = [61, *ids_of(DEFAULT_SYSTEM.format(date="2025-09-02")), 62]
FIRST = [1, *DEFAULT, *DEVELOPER, 65, *ids_of("Hi"), 66, 67, *ids_of("Ho"), 68]
SECOND = [1, 61, *ids_of("s"), 62, *DEVELOPER, 65, *ids_of("a"), 66, 67, *ids_of("b" * 40), 68]


@pytest.fixture
def built(tmp_path: Path, command: Command) -> tuple[str, ...]:
    """Two rows in a file, a tokenizer; the options that read them."""
    write_tokenizer(tmp_path / "tokenizer")
    rows = (GOOD, chat("system: s", "user: a", f"assistant: {'b' * 40}"))
    (tmp_path / "a.json").write_text("".join(json.dumps({"talk": row}) + "\n" for row in rows))
    return (
        *("build", "--input", "a.json", "--format", "chat", "--text-key", "talk"),
        *("--tokenizer", "tokenizer", "--date", "2025-09-02", "--output"),
    )


def test_conversations_are_built(tmp_path: Path, command: Command, parent: Parent, built: tuple[str, ...]) -> None:
    result = command(*built, "one")
    assert result["code"] == 0, result
    assert result["output"].splitlines()[:3] == [
        "built one: 4 files",
        f"  2 conversations, {len(FIRST) + len(SECOND)} tokens",
        f"  44 of them trained; the longest conversation has {len(FIRST)}",
    ]
    [found] = parent.run("tests.cases.data:indexed", arguments={"corpus": str(tmp_path / "one")})
    assert found["documents"] == [FIRST, SECOND]
    manifest = manifests.verify(tmp_path / "one")
    assert manifest.chat is not None
    assert vars(manifest.chat) == {
        "format": "apertus",
        "assistant_start_id": 67,
        "assistant_end_id": 68,
        "date": "2025-09-02",
        "default_systems": 1,
        "max_tokens": None,
        "dropped": 0,
        "longest_tokens": len(FIRST),
        "longest_at": "a.json, line 1",
        "trained_tokens": 44,
    }
    assert (manifest.tokenizer.bos_id, manifest.tokenizer.eos_id) == (1, 68)
    assert command(*built, "two")["code"] == 0
    names = ("corpus.bin", "corpus.idx", manifests.MANIFEST)
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    (tmp_path / "one" / "corpus.bin").write_bytes((tmp_path / "one" / "corpus.bin").read_bytes()[:-2] + b"\0\0")
    with pytest.raises(Differs, match="its SHA-256 is"):
        manifests.verify(tmp_path / "one")


def test_longer_ones_are_left_out(tmp_path: Path, command: Command, built: tuple[str, ...]) -> None:
    result = command(*built, "one", "--max-tokens", len(SECOND), "--drop-longer")
    assert result["output"].splitlines()[1:3] == [
        f"  1 conversations, {len(SECOND)} tokens",
        f"  41 of them trained; the longest conversation has {len(SECOND)}, 1 longer than {len(SECOND)} left out",
    ]
    result = command(*built, "two", "--max-tokens", "3", "--drop-longer")
    assert result == {"code": 2, "error": "no document has any text: nothing to build"}
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop-longer"], "--drop-longer needs --max-tokens: longer than what?"),
        (["--max-tokens", "0"], "--max-tokens is 0: it must be at least 1"),
        (
            ["--special-tokens", "parse"],
            "--special-tokens parse: what a turn says is text; leave it out with --format chat",
        ),
        (["--format", "jsonl"], "--date belongs to --format chat"),
        (["--max-tokens", "9"], ("a.json, line 1: the conversation has {first} tokens, and --max-tokens is 9: "
         "shorten it, or leave such ones out with --drop-longer")),
        (["--input", "none.jsonl"], "none.jsonl: no such file"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(
    tmp_path: Path, command: Command, built: tuple[str, ...], options: list[str], message: str
) -> None:
    expected = {"code": 2, "error": message.replace("{first}", str(len(FIRST)))}
    assert command(*built, "one", *options) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "tokenizer"]


def test_a_tokenizer_is_not_trained_on_conversations(tmp_path: Path, command: Command, built: tuple[str, ...]) -> None:
    options = [option for option in built if option not in ("--tokenizer", "tokenizer")]
    assert command(*options, "one", "--train-bpe", "300") == {
        "code": 2,
        "error": "chat data take the tokenizer of the model that is tuned: give it with --tokenizer",
    }
