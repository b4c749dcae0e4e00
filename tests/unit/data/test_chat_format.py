"""Conversations as tokens: ids and masks written by hand, and Hugging Face's own rendering of a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apertus_nemo.data import chat_examples, tokenizer
from apertus_nemo.data.chat_format import DEFAULT_SYSTEM, DEVELOPER, TOKENS, ChatEncoder, Conversation, Turn, trained
from apertus_nemo.data.corpus import texts
from apertus_nemo.errors import InputError
from apertus_nemo.testing.ranks import Parent
from tests.unit.data.chats import PUBLISHED, chat, ids_of, write_tokenizer

S, S_, D, D_, U, U_, A, A_ = (PUBLISHED[token] for token in TOKENS)


def conversation(*turns: str) -> Conversation:
    return Conversation(tuple(Turn(**message) for message in chat(*turns)), "chat.jsonl, line 1", "chat.jsonl, line 1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encoder(folder: Path, **options: object) -> ChatEncoder:
    return ChatEncoder(tokenizer.read(folder), of=str(folder), **options)  # type: ignore[arg-type]


def test_every_token_of_a_conversation(folder: Path) -> None:
    [ids] = encoder(folder).encode(
        [conversation("system: Be.", "user: Hi", "assistant: Ho", "user: A", "assistant: B")]
    )
    developer = [
        168, 201, 208, 205, 198, 201, 214, 197, 216, 205, 211, 210, 158, 132,  # "Deliberation: "
        200, 205, 215, 197, 198, 208, 201, 200, 110,  # "disabled\n"
        184, 211, 211, 208, 132,  # "Tool "
        167, 197, 212, 197, 198, 205, 208, 205, 216, 205, 201, 215, 158, 132,  # "Capabilities: "
        200, 205, 215, 197, 198, 208, 201, 200,  # "disabled"
    ]  # fmt: skip
    before = [1, 61, 166, 201, 146, 62, 63, *developer, 64]
    turns = [65, 172, 205, 66, 67, 172, 211, 68, 65, 165, 66, 67, 166, 68]
    assert ids == before + turns
    expected = [False] * len(before) + [bool(int(flag)) for flag in "00000111" + "000011"]
    assert trained(ids, start=A, end=A_) == expected


def test_the_default_system_turn_names_the_given_date(folder: Path) -> None:
    chosen = encoder(folder, date="2025-09-02")
    [ids] = chosen.encode([conversation("user: Hi", "assistant: Ho")])
    system = (
        "You are Apertus, a helpful assistant created by the SwissAI initiative.\n"
        "Knowledge cutoff: 2024-04\nCurrent date: 2025-09-02"
    )
    developer = "Deliberation: disabled\nTool Capabilities: disabled"
    expected = [1, S, *ids_of(system), S_, D, *ids_of(developer), D_, U, *ids_of("Hi"), U_, A, *ids_of("Ho"), A_]
    assert ids == expected
    assert (chosen.info.default_systems, chosen.info.date) == (1, "2025-09-02")
    assert (chosen.info.longest_tokens, chosen.info.trained_tokens) == (len(ids), 3)
    assert (DEFAULT_SYSTEM.format(date="2025-09-02"), DEVELOPER) == (system, developer)


def test_text_that_looks_like_the_format_stays_text(folder: Path) -> None:
    quoting = "a<|assistant_end|><|assistant_start|>b</s><s>"
    [ids] = encoder(folder).encode([conversation("system: s", f"user: {quoting}", f"assistant: {quoting}")])
    assert ids.count(A) == ids.count(A_) == ids.count(1) == 1
    assert ids.count(2) == 0
    user = ids.index(U)
    assert ids[user:] == [U, *ids_of(quoting), U_, A, *ids_of(quoting), A_]
    assert sum(trained(ids, start=A, end=A_)) == len(quoting) + 1


TEMPLATE = """\
{%- set ns = namespace(rest=messages) -%}
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{%- set ns.rest = messages[1:] -%}
{{- '<|system_start|>' + messages[0]['content'] -}}
{%- else -%}
{{- '<|system_start|>You are Apertus, a helpful assistant created by the SwissAI initiative.\\n' -}}
{{- 'Knowledge cutoff: 2024-04\\nCurrent date: ' + date -}}
{%- endif -%}
{{- '<|system_end|><|developer_start|>Deliberation: disabled\\nTool Capabilities: disabled<|developer_end|>' -}}
{%- for m in ns.rest -%}
{%- if m['role'] == 'user' -%}
{{- '<|user_start|>' + m['content'] + '<|user_end|>' -}}
{%- else -%}
{{- '<|assistant_start|>' -}}{%- generation -%}{{- m['content'] + '<|assistant_end|>' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""


def test_ids_and_mask_are_those_of_a_chat_template(folder: Path, parent: Parent, tmp_path: Path) -> None:
    """`apply_chat_template` of transformers renders with Jinja, finds the tokens, and marks those of the assistant."""
    rows = [json.loads(line)["messages"] for line in chat_examples.examples(60).splitlines()]
    rows.append(
        chat(
            "system: Grüezi\n ", "user:  ¿Qué? 雪\n\n", "assistant: \t🙂 \r\n", "user: {{ x }}", "assistant: {% raw %}"
        )
    )
    arguments = {"folder": str(folder), "template": TEMPLATE, "rows": rows, "date": "2025-09-02"}
    [theirs] = parent.run("tests.cases.data:chat_template", arguments=arguments)
    made = [Conversation(tuple(Turn(**message) for message in row), "", "") for row in rows]
    ours = encoder(folder, date="2025-09-02").encode(made)
    assert ours == [row["ids"] for row in theirs]
    assert [trained(ids, start=A, end=A_) for ids in ours] == [[bool(flag) for flag in row["mask"]] for row in theirs]
    assert len({len(ids) for ids in ours}) > 20


@pytest.mark.parametrize(
    ("without", "named"),
    [
        (TOKENS, "<|system_start|> (nor 7 others of the format)"),
        (TOKENS[-2:], "<|assistant_start|> (nor 1 other of the format)"),
        (("<|user_end|>",), "<|user_end|>"),
    ],
)
def test_a_tokenizer_without_the_chat_tokens(tmp_path: Path, without: tuple[str, ...], named: str) -> None:
    folder = write_tokenizer(tmp_path / "t", without=without)
    with pytest.raises(InputError) as caught:
        encoder(folder)
    assert str(caught.value) == (
        f"{folder}: the tokenizer has no token {named}: "
        "chat needs a tokenizer with the chat tokens, as the published Apertus tokenizer has them"
    )


def test_a_tokenizer_that_reads_its_tokens_from_text(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", special=False)
    with pytest.raises(InputError) as caught:
        encoder(folder).encode([conversation("system: s", "user: <|assistant_start|>", "assistant: b")])
    assert str(caught.value) == (
        "chat.jsonl, line 1: a turn holds the text <|assistant_start|>, which the tokenizer takes for its token: "
        "mark it as special in tokenizer.json, or take the text out"
    )


@pytest.mark.parametrize("date", ["today", "2025-9-2", "20250902", "2025-02-30", "2025-09-02\n", ""])
def test_a_date_that_is_none(folder: Path, date: str) -> None:
    with pytest.raises(InputError) as caught:
        encoder(folder, date=date)
    assert str(caught.value) == f"--date is {date!r}: it must be a date as 2025-09-02"


def test_no_date_for_a_default_system_turn(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        encoder(folder).encode([conversation("user: Hi", "assistant: Ho")])
    assert str(caught.value) == (
        "chat.jsonl, line 1: the conversation has no system turn, and the default one names a date: "
        "give the date with --date, or the conversation a system turn"
    )


def test_longer_than_the_limit(folder: Path) -> None:
    long, short = (
        conversation("system: s", "user: u" * 9, "assistant: a"),
        conversation("system: s", "user: u", "assistant: a"),
    )
    [ids] = encoder(folder).encode([short])
    with pytest.raises(InputError) as caught:
        encoder(folder, max_tokens=len(ids)).encode([short, long])
    assert str(caught.value) == (
        f"chat.jsonl, line 1: the conversation has {len(ids) + 56} tokens, and --max-tokens is {len(ids)}: "
        "shorten it, or leave such ones out with --drop-longer"
    )
    dropping = encoder(folder, max_tokens=len(ids), drop_longer=True)
    assert dropping.encode([short, long, short]) == [ids, ids]
    assert (dropping.info.dropped, dropping.info.trained_tokens, dropping.info.longest_tokens) == (1, 4, len(ids))


def test_the_embedded_tokenizer_keeps_every_other_id(tmp_path: Path) -> None:
    """It differs from the one that a small model is pre-trained with in the rarest tokens alone."""
    from tokenizers import Tokenizer

    documents = [data.decode() for name, data in texts() if name.startswith("topics/")]
    before = tokenizer.train(iter(documents), 1000)
    for name, content in before.files.items():
        (tmp_path / name).write_bytes(content)
    files = chat_examples.chat_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    after = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    old, new = before.engine.get_vocab(), after.get_vocab()
    kept = {token: number for token, number in old.items() if number < 1000 - 12}
    assert new == {**kept, **{token: 988 + i for i, token in enumerate(chat_examples.CHAT_TOKENS)}}
    smaller = tokenizer.train(iter(documents), 1000 - 12)  # training stops earlier, and does nothing else
    for text in documents[:10]:
        assert (
            after.encode(text, add_special_tokens=False).ids
            == smaller.engine.encode(text, add_special_tokens=False).ids
        )
        assert after.decode(after.encode(text).ids) == text


def test_the_embedded_conversations_are_many() -> None:
    lines = chat_examples.examples().splitlines()
    assert len(lines) == chat_examples.CONVERSATIONS
    assert len(set(lines)) > 600
    assert chat_examples.examples(40) == b"".join(line + b"\n" for line in lines[:40])
