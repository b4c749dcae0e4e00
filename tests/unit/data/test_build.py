"""`apertus-nemo data build`: what is in the folder, that it is reproducible, and that it is complete or absent."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apertus_nemo.cli.data import main
from apertus_nemo.data import manifest as manifests
from apertus_nemo.errors import InputError
from apertus_nemo.testing.ranks import Parent
from tests.unit.data.conftest import Command, texts


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_megatron_and_transformers_read_back_the_text(parent: Parent, corpus: Path, documents: list[str]) -> None:
    [found] = parent.run("tests.cases.data:indexed", arguments={"corpus": str(corpus)})
    assert found["dtype"] == "uint16"
    assert found["document_indices"] == list(range(len(documents) + 1))  # one sequence a document
    assert all(ids[0] == 1 and ids[-1] == 2 and not {1, 2} & set(ids[1:-1]) for ids in found["documents"])
    manifest = manifests.load(corpus)
    assert (manifest.documents, manifest.empty_documents) == (len(documents), 1)
    assert manifest.tokens == sum(map(len, found["documents"]))
    assert max(map(max, found["documents"])) == manifest.tokenizer.vocab_size - 1
    arguments = {"folder": str(corpus / "tokenizer"), "ids": found["documents"], "text": documents[0]}
    [peer] = parent.run("tests.cases.data:transformers_decode", arguments=arguments)
    assert peer["texts"] == documents
    assert peer["special"] == [1, 2, 3, 0]
    assert peer["ids"] == found["documents"][0][:-1]  # as the published tokenizer: <s> in front, no </s>


def test_two_builds_have_the_same_bytes(tmp_path: Path, parent: Parent, corpus: Path, jsonl: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / jsonl.name).write_bytes(jsonl.read_bytes())
    arguments = ["build", "--input", jsonl.name, "--train-bpe", "300", "--output", str(tmp_path / "again")]
    [result] = parent.run(
        "tests.cases.data:command",
        arguments={"arguments": arguments, "folder": str(elsewhere)},
        environment={"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert result["code"] == 0
    assert content(tmp_path / "again") == content(corpus)
    assert sorted(os.listdir(tmp_path)) == ["again", "elsewhere"]
    assert str(tmp_path).encode() not in content(tmp_path / "again")["manifest.json"]


def test_an_existing_tokenizer(
    tmp_path: Path, command: Command, corpus: Path, documents: list[str], parent: Parent
) -> None:
    tokenizer = tmp_path / "given"
    tokenizer.mkdir()
    tree = json.loads((corpus / "tokenizer/tokenizer.json").read_text())
    tree["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tree["padding"] = {
        "strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (tokenizer / "tokenizer.json").write_text(json.dumps(tree))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    (tokenizer / "modeling.py").write_text("raise SystemExit('must not run')")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / f"texts/{number:03d}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    result = command("build", "--input", "texts/*.gz", "--tokenizer", "given", "--output", "new/folder/out", "--json")
    assert result["code"] == 0
    printed = json.loads(result["output"])
    manifest = manifests.verify(tmp_path / "new/folder/out")
    assert printed["manifest_digest"] == f"sha256:{manifests.digest(manifest)}"
    assert printed["tokens"] == manifest.tokens
    assert manifest.tokenizer == manifests.TokenizerInfo("given", 300, bos_id=1, eos_id=2, pad_id=3, unk_id=0)
    assert [entry.name for entry in manifest.inputs] == [f"{number:03d}.txt.gz" for number in range(len(documents))]
    new = content(tmp_path / "new/folder/out")
    assert new["corpus.bin"] == content(corpus)["corpus.bin"]  # neither cut nor filled up
    assert new["tokenizer/tokenizer.json"] == (tokenizer / "tokenizer.json").read_bytes()
    assert "tokenizer/modeling.py" not in new


@pytest.mark.parametrize(("choice", "ends"), [("text", 0), ("parse", 1)])
def test_special_tokens_in_text(
    tmp_path: Path, command: Command, corpus: Path, parent: Parent, choice: str, ends: int
) -> None:
    (tmp_path / "a.txt").write_text("arm</s>bear")
    chosen = ("--tokenizer", corpus / "tokenizer", "--special-tokens", choice)
    assert command("build", "--input", "a.txt", *chosen, "--output", "out")["code"] == 0
    [found] = parent.run("tests.cases.data:indexed", arguments={"corpus": str(tmp_path / "out")})
    [ids] = found["documents"]
    assert ids[1:-1].count(2) == ends
    swapped = ("--tokenizer", corpus / "tokenizer/tokenizer.json", "--bos", "<pad>", "--eos", "<unk>")
    assert command("build", "--input", "a.txt", *swapped, "--output", "out", "--force")["code"] == 0
    [found] = parent.run("tests.cases.data:indexed", arguments={"corpus": str(tmp_path / "out")})
    assert (found["documents"][0][0], found["documents"][0][-1]) == (3, 0)


def refusal(*arguments: object) -> str:
    with pytest.raises(InputError) as refused:
        main(["build", *(str(argument) for argument in arguments)])
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text(" ".join(texts(2)))
    Path("short.txt").write_text("ab")
    Path("bad.txt").write_bytes(b"ab\xff")
    Path("rows.jsonl").write_text('{"text": "x"}\n{"text": 1}\n')
    Path("none.jsonl").write_text('{"text": ""}\n')
    Path("bad.json").write_text("{}")
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    before = content(tmp_path)
    names = sorted(os.listdir())
    out = ("--output", "deep/out")
    bpe = ("--train-bpe", 300)
    assert refusal("--input", "short.txt", *bpe, *out) == (
        "the text is too small for a vocabulary of 300: it gives 261; add text or give a smaller --train-bpe"
    )
    assert refusal("--input", "short.txt", "--train-bpe", 259, *out) == (
        "--train-bpe 259: must be at least 260 (256 bytes, 4 special tokens)"
    )
    assert refusal("--input", "good.txt", "--input", "bad.txt", *bpe, *out) == (
        "bad.txt: not UTF-8 at byte 2 (0xff): convert the file to UTF-8"
    )
    assert refusal("--input", "rows.jsonl", *bpe, *out) == "rows.jsonl, line 2: 'text' is int, not a string"
    assert refusal("--input", "none.jsonl", "--tokenizer", corpus / "tokenizer", *out) == (
        "no document has any text: nothing to build"
    )
    assert refusal("--input", "rows.jsonl", "--tokenizer", corpus / "tokenizer", *out) == (
        "rows.jsonl, line 2: 'text' is int, not a string"
    )
    assert refusal("--input", "good.txt", "--tokenizer", "absent", *out) == (
        "absent: no such file; --tokenizer takes a folder on this machine that holds tokenizer.json, or that file"
    )
    assert refusal("--input", "good.txt", "--tokenizer", "bad.json", *out).startswith(
        "bad.json is not a tokenizer in the format of the tokenizers library: "
    )
    assert refusal("--input", "good.txt", "--tokenizer", corpus / "tokenizer", "--eos", "<end>", *out) == (
        f"{corpus / 'tokenizer'}: the tokenizer has no token '<end>': name one with --eos"
    )
    assert refusal("--input", "good.txt", *bpe, "--eos", "x", *out).startswith("--bos and --eos choose tokens of")
    taken = tmp_path / "taken"
    assert (
        refusal("--input", "good.txt", *bpe, "--output", "taken") == f"{taken} holds other files: name another --output"
    )
    assert refusal("--input", "good.txt", *bpe, "--output", "taken", "--force") == (
        f"{taken} holds other files: name another --output"
    )
    assert refusal("--input", "good.txt", *bpe, "--output", "good.txt") == (
        f"{tmp_path / 'good.txt'} exists and is not a folder: name another --output"
    )
    assert refusal("--input", "good.txt", *bpe, "--output", corpus) == (
        f"{corpus} is a built corpus already: name another --output, or replace it with --force"
    )
    assert refusal("--input", "good.txt", *bpe, "--output", "good.txt/out") == (
        f"{tmp_path / 'good.txt'} is not a folder: name another --output"
    )
    assert content(tmp_path) == before
    assert sorted(os.listdir()) == names
    manifests.verify(corpus)


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["build"], ["build", "--input", "x", "--output", "y"], ["other"], []):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "apertus-nemo data" in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, parent: Parent, corpus: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(texts(40)))
    arguments = ["build", "--input", "a.txt", "--tokenizer", str(corpus / "tokenizer"), "--output", "out"]
    [result] = parent.run(
        "tests.cases.data:command",
        arguments={"arguments": arguments, "folder": str(tmp_path), "largest_file_bytes": 4096},
    )
    assert result["code"] == 3
    assert result["error"] == f"could not write {tmp_path / 'out'}: File too large"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_of_two_builds_at_once_one_is_there(tmp_path: Path, parent: Parent, corpus: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(texts(40)))
    arguments = ["build", "--input", "a.txt", "--tokenizer", str(corpus / "tokenizer"), "--output", "out"]
    results = parent.run(
        "tests.cases.data:command", world_size=2, arguments={"arguments": arguments, "folder": str(tmp_path)}
    )
    assert sorted(result["code"] for result in results) == [0, 2]
    [error] = [result["error"] for result in results if result["code"]]
    assert error in {
        f"{tmp_path / 'out'} appeared while the corpus was built: name another --output",
        f"{tmp_path / 'out'} is a built corpus already: name another --output, or replace it with --force",
    }
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]
    manifests.verify(tmp_path / "out")


def test_an_ended_build_leaves_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    root = Path(__file__).resolve().parents[3]
    code = "import sys; from apertus_nemo.cli.data import main; sys.exit(main(sys.argv[1:]))"
    arguments = [
        "build",
        "--input",
        str(tmp_path / "pipe.jsonl"),
        "--train-bpe",
        "300",
        "--output",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=root, stderr=subprocess.PIPE)
    try:
        with (tmp_path / "pipe.jsonl").open("w") as pipe:  # opens once the build reads
            pipe.write('{"text": "a"}\n')
            pipe.flush()
            assert len(os.listdir(tmp_path)) == 2
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
        process.communicate()
    assert os.listdir(tmp_path) == ["pipe.jsonl"]
