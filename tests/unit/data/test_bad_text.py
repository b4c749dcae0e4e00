"""Bad text, tokenizers and folders, through the command: the whole line, the exit code, and nothing left or lost."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.record.files import tree_manifest
from tests.integration.command import apertus, on_a_terminal, shell
from tests.unit.audit.sealed import make_sealed
from tests.unit.data.conftest import Command, texts

ROOT = Path(__file__).resolve().parents[3]
HUGE = "a document of more than 64 MiB: cut it into several, for example as JSONL, one a line"
PACKED = "the compressed file is {}: fetch or pack it again"
TEXT = "".join(texts(4)).encode()


def sparse(path: Path, size_bytes: int = 64 * 2**30) -> None:
    """A file far larger than memory, that takes no space."""
    with path.open("wb") as stream:
        stream.truncate(size_bytes)


def written(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


# name of the file -> (what is done to it, what the line says of it)
TEXTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing.txt": (lambda path: None, ": no such file"),
    "folder.txt": (Path.mkdir, " is a folder: name its files, for example folder.txt/*.txt"),
    "empty.txt": (written(b""), " is empty: leave it out"),
    "empty.jsonl": (written(b""), " is empty: leave it out"),
    "empty.txt.gz": (written(gzip.compress(b"")), " is empty: leave it out"),
    "latin.txt": (written("Zürich".encode("latin-1")), ": not UTF-8 at byte 1 (0xfc): convert the file to UTF-8"),
    "utf16.txt": (written("Zürich".encode("utf-16")), ": not UTF-8 at byte 0 (0xff): convert the file to UTF-8"),
    "cut.txt": (written("Zürich, île".encode()[:-3]), ": not UTF-8 at byte 9 (0xc3): convert the file to UTF-8"),
    "cut.txt.gz": (written(gzip.compress(TEXT)[:-9]), ": " + PACKED.format("truncated")),
    "cut.txt.bz2": (written(bz2.compress(TEXT)[:-9]), ": " + PACKED.format("truncated")),
    "cut.txt.xz": (written(lzma.compress(TEXT)[:-9]), ": " + PACKED.format("truncated")),
    "cut.jsonl": (
        written(b'{"text": "a"}\n{"text": "b'),
        ", line 2: not JSON (Unterminated string starting at): every line must be one JSON object",
    ),
    "huge.txt": (sparse, f": {HUGE}"),
    "huge.jsonl": (sparse, f", line 1: {HUGE}"),
    "huge.txt.gz": (written(gzip.compress(bytes(65 * 2**20), 1)), f": {HUGE}"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = TEXTS[name]
    make(Path(name))
    before = sorted(os.listdir())
    assert main(["data", "build", "--input", name, "--train-bpe", "300", "--output", "deep/out"]) == 2
    assert capsys.readouterr() == ("", f"apertus-nemo: {name}{said}\n")
    assert sorted(os.listdir()) == before


def test_a_tokenizer_without_an_end_of_document_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes(TEXT)
    shutil.copytree(corpus / "tokenizer", "given")
    file = Path("given/tokenizer.json")
    file.write_text(file.read_text().replace('"</s>"', '"<end>"'))
    config = json.loads(Path("given/tokenizer_config.json").read_text())
    del config["eos_token"]
    Path("given/tokenizer_config.json").write_text(json.dumps(config))
    arguments = ["data", "build", "--input", "a.txt", "--tokenizer", "given", "--output", "out"]
    assert main(arguments) == 2
    assert capsys.readouterr() == (
        "",
        "apertus-nemo: given: the tokenizer has no token '</s>': name one with --eos\n",
    )
    assert sorted(os.listdir()) == ["a.txt", "given"]


def test_data_that_a_run_cannot_take(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    corpus: Path,
    command: Command,
) -> None:
    """A corpus of one token (and its marks of begin and end), and a vocabulary larger than the model's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("a.txt").write_text("a")
    assert command("build", "--input", "a.txt", "--train-bpe", "260", "--output", "one")["code"] == 0
    before = tree_manifest(tmp_path)
    train = ["train", "--quiet", "--allow-dirty", "--run-dir", "run", "data=built"]
    assert main([*train, "data.path=one"]) == 2
    assert capsys.readouterr().err == (
        "apertus-nemo: data.seq_length is 256, so a sample needs 257 tokens, but the corpus has 3: add text or set a "
        "smaller data.seq_length\n"
    )
    assert main([*train, f"data.path={corpus}", "model.vocab_size=288", "data.tokenizer_vocab_size=288"]) == 2
    assert capsys.readouterr().err == (
        "apertus-nemo: model.vocab_size is 288, but the tokenizer of the data has 300 ids: set model.vocab_size to at "
        "least 300, or build the data with a smaller vocabulary\n"
    )
    assert not Path("run").exists()
    assert tree_manifest(tmp_path) == before


def test_folders_that_cannot_be_written(tmp_path: Path, corpus: Path) -> None:
    """For root, too: without the capability that lets it pass over permissions."""
    drop = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    (tmp_path / "a.txt").write_bytes(TEXT)
    run = make_sealed(tmp_path / "sealed")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = tree_manifest(tmp_path)
    commands = {
        "out": ["data", "build", "--input", "a.txt", "--train-bpe", "300", "--output", f"{locked}/out"],
        "report.html": ["report", str(run), "--no-verify", "-o", f"{locked}/report.html"],
        "copy": ["record", "push", str(run), f"{locked}/copy"],
        "gh200-clariden.toml": ["edf", "render", "gh200", "--site", "clariden", "-o", str(locked)],
        "run": ["train", "--quiet", "--allow-dirty", "--run-dir", f"{locked}/run", "data=built", f"data.path={corpus}"],
        "apertus-nemo/corpus": ["train", "--quiet", "--allow-dirty", "--run-dir", "new"],  # the cache of the user
    }
    for name, arguments in commands.items():
        done = subprocess.run(
            [*drop, sys.executable, "-m", "apertus_nemo.cli.main", *arguments],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "HOME": str(tmp_path),
                "XDG_CACHE_HOME": str(locked if name == "apertus-nemo/corpus" else tmp_path / "cache"),
            },
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (done.returncode, done.stdout) == (3, ""), (name, done.stderr)
        assert done.stderr == (
            f"apertus-nemo: could not write {locked}/{name}: permission denied; choose another folder or its "
            "permissions\n"
        )
    locked.chmod(stat.S_IRWXU)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert tree_manifest(tmp_path) == before


@pytest.mark.parametrize("arguments", [["show"], ["show", "--json"], ["plan"], ["runs", "--json"], ["--help"]])
def test_output_that_goes_to_a_full_disk(arguments: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "apertus_nemo.cli.main", *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
        )
    assert (done.returncode, done.stderr) == (
        3,
        "apertus-nemo: could not write the output: the disk is full; free some space, then run the command again\n",
    )


@pytest.mark.full
def test_a_terminal_sees_progress_and_a_pipe_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT * 50)
    build = ["data", "build", "--input", "a.txt", "--train-bpe", "300", "--output"]
    environment = shell(tmp_path / "cache", tmp_path / "home")
    code, _, drawn = on_a_terminal([*build, "one"], folder=tmp_path, environment=environment)
    assert (code, "100%" in drawn, "Traceback" in drawn) == (0, True, False), drawn
    done = apertus([*build, "two"], folder=tmp_path, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree_manifest(tmp_path / "one") == tree_manifest(tmp_path / "two")
