"""Text, and a corpus built from it once a session."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.testing.ranks import Parent

WORDS = ["arm", "bear", "cloud", "Dürrenmatt", "ewig", "Fluss", "glacier", "huître", "île", "jour", "käse", "雪", "🙂"]
Command = Callable[..., dict[str, Any]]


def texts(count: int = 24, *, seed: int = 5) -> list[str]:
    """Documents of words in four languages, the same ones every time."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(WORDS) * draw.randint(1, 2) for _ in range(draw.randint(20, 160))) + "\n"
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """The text of the corpus below."""
    return texts()


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """The documents as JSONL, with an empty record and a blank line between them."""
    path = tmp_path_factory.mktemp("text") / "part.jsonl"
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(documents)]
    lines[3:3] = ["", json.dumps({"text": ""})]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, parent: Parent, jsonl: Path) -> Path:
    """The documents built with a trained tokenizer of 300 ids; not to be changed."""
    folder = tmp_path_factory.mktemp("built") / "corpus"
    arguments = ["build", "--input", str(jsonl), "--train-bpe", "300", "--output", str(folder)]
    [result] = parent.run("tests.cases.data:command", arguments={"arguments": arguments, "folder": str(folder.parent)})
    assert result["code"] == 0, result
    return folder


@pytest.fixture
def command(parent: Parent, tmp_path: Path) -> Command:
    """Run `apertus-nemo data` in tmp_path, in a rank that may import Megatron."""

    def call(*arguments: object) -> dict[str, Any]:
        texts = [str(argument) for argument in arguments]
        [result] = parent.run("tests.cases.data:command", arguments={"arguments": texts, "folder": str(tmp_path)})
        return dict(result)

    return call


@pytest.fixture
def mixed_corpora(tmp_path: Path, corpus: Path, command: Command) -> Path:
    """Three corpora with one tokenizer: `one`, `two/inner`, which has a fifth of its tokens, and `short`."""
    shutil.copytree(corpus, tmp_path / "one")
    (tmp_path / "a.txt").write_text("arm bear cloud " * 90)
    (tmp_path / "b.txt").write_text("arm")
    chosen = ("--tokenizer", corpus / "tokenizer", "--output")
    assert command("build", "--input", "a.txt", *chosen, "two/inner")["code"] == 0
    assert command("build", "--input", "b.txt", *chosen, "short")["code"] == 0
    return tmp_path
