"""Rows of chat data that are refused, word for word, and built corpora of those that are not."""
# ruff: noqa: E501  (messages are held word for word)

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
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


TURNS = "after a system turn, if any, user and assistant take turns; reorder the row, or leave it out"
LOST = "take it out if it does not matter, else leave the row out"
RESPONSE = {"type": "response", "text": "Ho"}
MESSAGES: list[tuple[Any, str]] = [
    (chat("critic: 42", "assistant: a"), "message 1 has the role 'critic': it must be system, user or assistant; rename it, or leave the row out"),
    (
        chat("user: a", "assistant: b", "tool: 42"),
        "message 3 has the role 'tool': chat data cannot have tools yet: leave the row out",
    ),
    (
        chat("developer: Deliberation: enabled", *["user: a", "assistant: b"]),
        "message 1 has the role 'developer': its block always says that deliberation and tools are disabled: take the message out if it says no more, else leave the row out",
    ),
    (
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "message 1 has from and value, not role and content: rename them, and human to user, gpt to assistant",
    ),
    (chat("User: a", "assistant: a"), "message 1 has the role 'User': it must be system, user or assistant; rename it, or leave the row out"),
    ([{"content": "a"}], "message 1 has the role none: it must be system, user or assistant; rename it, or leave the row out"),
    (
        [{"role": "\x1b[31m" + "x" * 200, "content": "a"}],
        r"message 1 has the role '\x1b[31m" + "x" * 91 + "..." + "x" * 9 + "': it must be system, user or assistant; rename it, or leave the row out",
    ),
    (chat("user: a", "assistant:  \n"), "message 2 is empty: the assistant must say something; leave the row out"),
    ([{"role": "user", "content": None}, GOOD[1]], "message 1 is empty: the user must say something; leave the row out"),
    ([{"role": "user"}, GOOD[1]], "message 1 is empty: the user must say something; leave the row out"),
    (chat("system: a"), "the conversation has only a system turn: there is nothing to learn; leave it out"),
    ([], "the conversation has no turn: there is nothing to learn; leave it out"),
    (chat("user: a"), "the last turn is the user's, and only the assistant's are learned: take it out, or leave the row out"),
    (
        chat("system: s", "user: a", "assistant: b", "user: c"),
        "the last turn is the user's, and only the assistant's are learned: take it out, or leave the row out",
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
    (["Hi"], "message 1 is str, not an object with role and content: write one"),
    ("Hi", "'messages' is str, not a list of messages: write one"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}, GOOD[1]],
        "message 1: its content is a list: write its texts as one text; a row with images or sound must be left out",
    ),
    (
        [{"role": "user", "content": 7}, GOOD[1]],
        "message 1: its content is int, not text: write a text, or as the user's an object with 'parts'",
    ),
    (
        [{"role": "user", "content": {"text": "a"}}, GOOD[1]],
        "message 1: its content is dict, not text: write a text, or as the user's an object with 'parts'",
    ),
    (
        [{"role": "user", "content": {"parts": [{"type": "image", "url": "x"}]}}, GOOD[1]],
        "message 1: item 1 of 'parts' has the type 'image': chat data can have 'text' alone yet: leave the row out",
    ),
    (
        [GOOD[0], {"role": "assistant", "content": {"blocks": [{"type": "thoughts", "text": "hm"}]}}],
        "message 2: item 1 of 'blocks' has the type 'thoughts': chat data can have 'response' alone yet: leave the row out",
    ),
    (
        [GOOD[0], {"role": "assistant", "content": {"blocks": [RESPONSE, {"type": "tool_calls", "calls": [1]}]}}],
        "message 2: item 2 of 'blocks' has the type 'tool_calls': chat data can have 'response' alone yet: leave the row out",
    ),
    (
        [GOOD[0], {"role": "assistant", "content": {"blocks": [{**RESPONSE, "calls": [1]}]}}],
        "message 2: item 1 of 'blocks' has the key 'calls', which would be lost: {lost}",
    ),
    (
        [GOOD[0], {"role": "assistant", "content": {"blocks": [RESPONSE], "parts": [1]}}],
        "message 2: its content has the key 'parts', which would be lost: {lost}",
    ),
    (
        [GOOD[0], {"role": "assistant", "content": {"blocks": ["a"]}}],
        "message 2: item 1 of 'blocks' is str, not an object with type and text: write one",
    ),
    (
        [GOOD[0], {"role": "assistant", "content": {"blocks": "a"}}],
        "message 2: 'blocks' of its content is str, not a list: write a list",
    ),
    (
        [GOOD[0], {"role": "assistant", "content": {"blocks": [{"text": "a"}]}}],
        "message 2: item 1 of 'blocks' has the type none: chat data can have 'response' alone yet: leave the row out",
    ),
    (
        [GOOD[0], {"role": "assistant", "content": {"blocks": []}}],
        "message 2 is empty: the assistant must say something; leave the row out",
    ),
    (
        [{"role": "system", "content": {"text": 3}}, *GOOD],
        "message 1: 'text' of its content is int, not text: write a text",
    ),
    (
        [GOOD[0], {**GOOD[1], "reasoning_content": "hm"}],
        "message 2 has the key 'reasoning_content', which would be lost: {lost}",
    ),
    (
        [GOOD[0], {**GOOD[1], "tool_calls": [{"id": "1"}]}],
        "message 2 has the key 'tool_calls', which would be lost: {lost}",
    ),
    (
        [GOOD[0], {**GOOD[1], "content": "\ud800"}],
        "message 2: its content holds half of a surrogate pair: repair the line",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "message"), MESSAGES)
def test_messages_that_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    assert refused(tmp_path, json.dumps({"messages": messages})) == message.replace("{turns}", TURNS).replace(
        "{lost}", LOST
    )


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
        (
            json.dumps({"messages": GOOD, "functions": [{"name": "f"}]}),
            "the row declares functions, which chat data cannot have yet: leave the row out",
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


def test_objects_that_the_published_template_takes_for_text(tmp_path: Path) -> None:
    """With the keys that a table of such rows has beside them, empty."""
    empty = {"text": "", "parts": None, "blocks": []}
    blocks = [{**RESPONSE, "calls": [], "outputs": None}, {"type": "response", "text": "!"}]
    row = [
        {"role": "system", "content": {**empty, "text": "Be."}},
        {"role": "user", "content": {**empty, "parts": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}},
        {"role": "assistant", "content": {**empty, "blocks": blocks}},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": row}))
    [found] = ChatReader(find([str(tmp_path / "a.jsonl")])[0], text_key="messages")
    assert found.turns == (Turn("system", "Be."), Turn("user", "Hi"), Turn("assistant", "Ho!"))


@pytest.mark.parametrize("kind", ["file", "memory", "s3"])
def test_rows_lie_anywhere_that_fsspec_reaches(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    place = {"file": f"file://{tmp_path}/x", "memory": f"memory://{tmp_path.name}", "s3": "s3://runs/chat"}[kind]
    lines = [json.dumps({"messages": GOOD}), json.dumps({"messages": chat("system: only")})]
    for name, data in (("good", gzip.compress(lines[0].encode())), ("bad", "\n".join(lines).encode())):
        system, path = fsspec.core.url_to_fs(f"{place}/{name}.jsonl{'.gz' if name == 'good' else ''}")
        system.makedirs(system._parent(path), exist_ok=True)
        system.pipe_file(path, data)
    [source] = find([f"{place}/g*.jsonl.gz"])
    [found] = ChatReader(source, text_key="messages")
    assert found.turns == (Turn("user", "Hi"), Turn("assistant", "Ho"))
    assert found.where == f"{place.removeprefix('file://')}/good.jsonl.gz, line 1".replace("memory://", "memory:///")
    with pytest.raises(InputError) as caught:
        list(ChatReader(find([f"{place}/bad.jsonl"])[0], text_key="messages"))
    assert str(caught.value).endswith(
        "/bad.jsonl, line 2: the conversation has only a system turn: there is nothing to learn; leave it out"
    )
    with pytest.raises(InputError, match=r"none\.jsonl: no such file$"):
        list(ChatReader(find([f"{place}/none.jsonl"])[0], text_key="messages"))


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
