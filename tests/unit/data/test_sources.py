"""Reading text: what is found, what is refused and how, and that no secret gets through."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from apertus_nemo.data.sources import Reader, find, without_credentials
from apertus_nemo.errors import InputError


def read(*inputs: object, text_key: str = "text", format: str | None = None) -> list[str]:
    found = find([str(text) for text in inputs], format=format)
    return [document for source in found for document in Reader(source, text_key=text_key)]


def refusal(*inputs: object, **options: str) -> str:
    with pytest.raises(InputError) as refused:
        read(*inputs, **options)  # type: ignore[arg-type]
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_text_and_jsonl_packed_or_not(tmp_path: Path, suffix: str, pack) -> None:  # type: ignore[no-untyped-def]
    text = "one\r\ntwo \u2028 Zürich\n" * 500
    rows = [{"text": "first"}, {"text": "", "n": 1}, {"text": "sec\u2028ond"}]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(text.encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(
        pack("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    )
    assert read(tmp_path / f"a.txt{suffix}") == [text]
    assert read(tmp_path / f"b.jsonl{suffix}") == ["first", "sec\u2028ond"]
    [source] = find([str(tmp_path / f"b.jsonl{suffix}")])
    reader = Reader(source)
    list(reader)
    stored = (tmp_path / f"b.jsonl{suffix}").read_bytes()
    assert (reader.size_bytes, reader.sha256, reader.empty_documents) == (
        len(stored),
        hashlib.sha256(stored).hexdigest(),
        1,
    )


def test_the_hash_is_that_of_the_whole_file(tmp_path: Path) -> None:
    stored = bz2.compress(b"text") + bytes(3_000_000)  # what follows the packed data is not text, yet part of the file
    (tmp_path / "a.txt.bz2").write_bytes(stored)
    [source] = find([str(tmp_path / "a.txt.bz2")])
    reader = Reader(source)
    assert list(reader) == ["text"]
    assert (reader.size_bytes, reader.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())


def test_order_names_and_formats(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "z[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d.txt").mkdir()
    sources = find([str(tmp_path / "deep/**/*.txt"), str(tmp_path / "[ab].txt"), str(tmp_path / "z[1].txt")])
    assert [source.name for source in sources] == ["deep/er/c.txt", "a.txt", "b.txt", "z[1].txt"]
    assert [source.name for source in find([str(tmp_path / "deep/er/c.txt")])] == ["c.txt"]
    (tmp_path / "rows.data").write_text('{"body": "x"}\n')
    assert read(tmp_path / "rows.data", format="jsonl", text_key="body") == ["x"]


def test_names_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    for name in ("x/a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path / "x")
    assert [source.name for source in find(["a.txt", "../b.txt"])] == ["x/a.txt", "b.txt"]
    monkeypatch.chdir(tmp_path)
    assert [source.name for source in find(["x/a.txt", "b.txt"])] == ["x/a.txt", "b.txt"]


def test_messages_about_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_bytes(b"")
    Path("empty.txt.gz").write_bytes(gzip.compress(b""))
    Path("blank.jsonl").write_bytes(b"\n \n")
    Path("latin.txt").write_bytes("Zürich und Genf".encode("latin-1"))
    packed = gzip.compress(b"text " * 1000)
    Path("cut.txt.gz").write_bytes(packed[:-9])
    Path("bad.txt.gz").write_bytes(b"no gzip at all")
    Path("twisted.txt.gz").write_bytes(packed[:-8] + bytes(8))
    Path("part.parquet").write_bytes(b"PAR1")
    Path("folder").mkdir()
    assert refusal("absent.txt") == "absent.txt: no such file"
    assert refusal("*.none") == "*.none: no file matches"
    assert refusal("folder") == "folder is a folder: name its files, for example folder/*.txt"
    assert refusal("latin.txt", "./latin.txt") == "./latin.txt is named twice: give each file once"
    assert refusal("empty.txt") == "empty.txt is empty: leave it out"
    assert refusal("empty.txt.gz") == "empty.txt.gz is empty: leave it out"
    assert refusal("blank.jsonl") == "blank.jsonl is empty: leave it out"
    assert refusal("latin.txt") == "latin.txt: not UTF-8 at byte 1 (0xfc): convert the file to UTF-8"
    assert refusal("cut.txt.gz") == "cut.txt.gz: the compressed file is truncated: fetch or pack it again"
    assert refusal("bad.txt.gz") == "bad.txt.gz: the compressed file is damaged: fetch or pack it again"
    assert refusal("twisted.txt.gz") == "twisted.txt.gz: the compressed file is damaged: fetch or pack it again"
    assert refusal("part.parquet").startswith("part.parquet: this kind of file cannot be read")
    assert refusal("nosuch://bucket/x").startswith("nosuch://bucket/x: cannot be reached: ValueError")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b"{'text': 1}",
            "not JSON (Expecting property name enclosed in double quotes): every line must be one JSON object",
        ),
        (b"[" * 100_000, "not JSON (too deep or too long): every line must be one JSON object"),
        (b'["text"]', "not a JSON object: every line must be one JSON object"),
        (b'{"txt": "x"}', "no key 'text': name the right one with --text-key"),
        (b'{"text": 5}', "'text' is int, not a string"),
        (b'{"text": "\\ud800"}', "'text' holds half of a surrogate pair: repair the line"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 26 (0xff): convert the file to UTF-8"),
    ],
)
def test_messages_about_lines(tmp_path: Path, line: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_bytes(b'{"text": "ok"}\n\n' + line + b"\n")
    separator = ", line 3: "
    assert refusal("rows.jsonl") == f"rows.jsonl{separator}{message}"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://user:pass@host/a.txt?sig=x#frag", "https://host/a.txt"),
        ("s3://key:se/cr3t@bucket/a.txt", "s3://bucket/a.txt"),
        ("s3://bucket/part@v1/a:b@c.txt", "s3://bucket/part@v1/a:b@c.txt"),
        ("https://host:8443/part@v1", "https://host:8443/part@v1"),
        ("s3://key:secret@bucket/a.txt", "s3://bucket/a.txt"),
        ("https://a:b@c:d@host:8443/x", "https://host:8443/x"),
        ("simplecache::https://u:p@host/x?token=1", "simplecache::https://host/x"),
        ("zip://in.txt::ftp://u:p@host/x.zip", "zip://in.txt::ftp://host/x.zip"),
        ("what?.txt", "what?.txt"),
    ],
)
def test_credentials_are_dropped(given: str, kept: str) -> None:
    assert without_credentials(given) == kept


def test_any_fsspec_path() -> None:
    system = fsspec.filesystem("memory")
    for name in ("b", "a"):
        system.pipe(f"/texts/{name}.txt", name.encode())
    assert read("memory://texts/*.txt") == ["a", "b"]
    assert [source.name for source in find(["memory://texts/b.txt"])] == ["memory://texts/b.txt"]
    assert refusal("memory://texts/c.txt") == "memory://texts/c.txt: no such file"


class Handler(BaseHTTPRequestHandler):
    """Serves one text to those who know the signature."""

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(b"signed text")

    def answer(self, body: bytes) -> None:
        good = self.path == "/a.txt?sig=SECRET"
        self.send_response(200 if good else 403)
        self.send_header("Content-Length", str(len(body) if good else 0))
        self.end_headers()
        if good:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join(timeout=10)


def test_signed_urls_are_read_and_not_repeated(server: str) -> None:
    [source] = find([f"http://{server}/a.txt?sig=SECRET"])
    assert source.name == source.label == f"http://{server}/a.txt"
    assert list(Reader(source)) == ["signed text"]
    for url in (f"http://user:SECRET@{server}/a.txt?sig=OTHERSECRET", f"http://{server}/b.txt?sig=SECRET"):
        message = refusal(url)
        assert "SECRET" not in message
        assert message.startswith(f"http://{server}/")
