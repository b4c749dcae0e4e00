"""Samples of conversations: which, in what order, with what labels; the same wherever they are read from."""
# ruff: noqa: E501  (messages are held word for word)

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.testing.ranks import Parent
from tests.unit.data.chats import chat, write_tokenizer
from tests.unit.data.conftest import Command

SEQ = 320
COUNT = 30


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory, parent: Parent) -> Path:
    """Thirty conversations of one to three questions."""
    folder = tmp_path_factory.mktemp("chat")
    draw = random.Random(3)
    rows = []
    for i in range(COUNT):
        turns = [
            f"{role}: {'abcdefgh'[j] * draw.randint(1, 40)}"
            for j in range(draw.randint(1, 3))
            for role in ("user", "assistant")
        ]
        rows.append(chat(f"system: {i:02}", *turns))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    write_tokenizer(folder / "tokenizer")
    arguments = ["build", "--input", "rows.jsonl", "--format", "chat", "--tokenizer", "tokenizer", "--output", "built"]
    [result] = parent.run("tests.cases.data:command", arguments={"arguments": arguments, "folder": str(folder)})
    assert result["code"] == 0, result
    return folder / "built"


@pytest.fixture(scope="module")
def rows(conversations: Path, parent: Parent) -> list[list[int]]:
    """The ids of each conversation, by Megatron's reader."""
    [found] = parent.run("tests.cases.data:indexed", arguments={"corpus": str(conversations)})
    return list(found["documents"])


def chat_samples(parent: Parent, corpus: Path, indices: list[int], **changes: Any) -> dict[str, Any]:
    options = {"kind": "chat", "goldfish": False, "vocab_size": 512, "seq_length": SEQ, "train_samples": 3 * COUNT}
    arguments = {"corpus": str(corpus), "indices": indices, "changes": {**options, **changes}}
    [found] = parent.run("tests.cases.data:chat_samples", arguments=arguments)
    return dict(found)


def by_hand(ids: list[list[int]]) -> dict[str, list[int]]:
    """A sample of these conversations, as the page on data says it."""
    tokens, wanted, documents = [], [], []
    for number, conversation in enumerate(ids):
        speaking = False
        for token in conversation:
            tokens.append(token)
            documents.append(number)
            wanted.append(1 if speaking else 0)
            if token == 67:
                speaking = True
            if token == 68:
                speaking = False
    padding = SEQ + 1 - len(tokens)
    tokens, wanted = tokens + [3] * padding, wanted + [0] * padding
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": wanted[1:],
        "position_ids": list(range(SEQ)),
        "documents": documents + [len(ids)] * (SEQ - len(documents)),
    }


def test_a_sample_is_one_conversation(parent: Parent, conversations: Path, rows: list[list[int]]) -> None:
    found = chat_samples(parent, conversations, list(range(3 * COUNT)))
    orders = [found["conversations"][epoch * COUNT : (epoch + 1) * COUNT] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == [[i] for i in range(COUNT)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert found["rows"] == COUNT
    for sample, [number] in zip(found["samples"], found["conversations"], strict=True):
        expected = by_hand([rows[number]])
        del expected["documents"]
        assert sample == expected
    trained = sum(sum(sample["loss_mask"]) for sample in found["samples"][:COUNT])
    assert trained == sum(row.index(68) - row.index(67) for row in [r[k:] for r in rows for k in _starts(r)])


def _starts(row: list[int]) -> list[int]:
    return [i for i, token in enumerate(row) if token == 67]


def test_packed_samples_hold_whole_conversations(parent: Parent, conversations: Path, rows: list[list[int]]) -> None:
    changes = {"packing": True, "document_masking": "per_document"}
    count = chat_samples(parent, conversations, [0], **changes)["rows"]
    assert sum(map(len, rows)) / SEQ <= count < COUNT / 1.5
    found = chat_samples(parent, conversations, list(range(2 * count)), **changes)
    first, second = found["conversations"][:count], found["conversations"][count:]
    assert sorted(number for row in first for number in row) == list(range(COUNT))
    assert sorted(first) == sorted(second)
    assert first != second
    assert max(map(len, first)) > 2
    for sample, numbers in zip(found["samples"], found["conversations"], strict=True):
        assert sample == by_hand([rows[number] for number in numbers])


def test_seed_and_nothing_else_decides_the_order(parent: Parent, conversations: Path) -> None:
    indices = [41, 3, 88]
    one = chat_samples(parent, conversations, indices)
    assert chat_samples(parent, conversations, indices) == one
    assert chat_samples(parent, conversations, indices, train_samples=1000)["samples"] == one["samples"]
    assert chat_samples(parent, conversations, indices, seed=29)["conversations"] != one["conversations"]
    [first] = chat_samples(parent, conversations, [3])["digests"]
    assert first == one["digests"][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "text"},
            "data.kind is text, but {corpus} was built from conversations: set data.kind=chat",
        ),
        (
            {"seq_length": 100},
            (
                "data.seq_length is 100, but the conversation in rows.jsonl, line {line} of the data has {longest} tokens: "
                "set data.seq_length to at least {longest}, or build the data with --max-tokens 100 --drop-longer"
            ),
        ),
        (
            {"vocab_size": 300},
            (
                "model.vocab_size is 300, but the tokenizer of the data has 356 ids: set model.vocab_size to at least 356, "
                "or build the data with a smaller vocabulary"
            ),
        ),
    ],
)
def test_a_recipe_that_does_not_fit(
    parent: Parent, conversations: Path, rows: list[list[int]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    longest = max(map(len, rows))
    options = {"kind": "chat", "goldfish": False, "vocab_size": 512, "seq_length": SEQ, **changes}
    arguments = {"corpus": str(conversations), "cache": str(tmp_path), "changes": options}
    [found] = parent.run("tests.cases.data:refused", arguments=arguments)
    line = next(i for i, row in enumerate(rows, start=1) if len(row) == longest)
    assert found == message.format(corpus=conversations, longest=longest, line=line)


def test_documents_are_no_conversations(parent: Parent, corpus: Path, tmp_path: Path, command: Command) -> None:
    arguments = {"corpus": str(corpus), "cache": str(tmp_path), "changes": {"kind": "chat", "goldfish": False}}
    [found] = parent.run("tests.cases.data:refused", arguments=arguments)
    assert found == (
        f"data.kind is chat, but {corpus} was built from documents of text: "
        "build it with `apertus-nemo data build --format chat`, or set data.kind=text"
    )
