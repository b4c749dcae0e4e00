"""EDFs that are not even wrong: `apertus-nemo edf` answers soon, on lines that a terminal can show, and never with a
fault of its own.

A case is drawn by its number: random bytes, a real pattern with damage, a file made of hostile values, files that
inherit from each other in every way, huge files, other encodings. Exit code 4 or an exception is a fault of ours.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_nemo.cli.main import main
from apertus_nemo.edf.check import View, check_document
from apertus_nemo.edf.dialects import CE, SARUS
from apertus_nemo.edf.document import parse_document
from apertus_nemo.edf.expand import expand
from apertus_nemo.edf.finding import Fault

CORPUS = sorted((Path(__file__).resolve().parents[1] / "unit" / "edf" / "corpus").glob("*.toml"))
SECONDS = 5.0  # of processor time, in one case; the usual one takes milliseconds

TOKENS = [
    *("[", "]", "[[", "]]", "{", "}", "=", ".", ",", "#", "\n", "\r\n", "\t", '"', "'", '"""', "'''", "\\", "\\u0000"),
    *(
        "${",
        "}",
        "$",
        "$$",
        "$(",
        "`",
        ";",
        ":",
        "~",
        "..",
        "./",
        "/",
        "@sha256:",
        "\x00",
        "\x7f",
        "\ufeff",
        "\u202e",
        "é",
    ),
    *("[env]", "[annotations]", "[annotations.com.hooks.cxi]", "image = ", "mounts = [", "com.hooks.", "true", "1e999"),
]
KEYS = [
    *(
        "image",
        "mounts",
        "mount",
        "env",
        "annotations",
        "base_environment",
        "workdir",
        "entrypoint",
        "writable",
        "devices",
    ),
    *("com", "hooks", "NCCL_DEBUG", '"a.b"', '""', "'\\u202e'", '"\\u001b[2J"'),
]
TEXTS = [
    *(
        "",
        "x",
        "/",
        ":",
        "::",
        ":::",
        "a:b",
        "/a:/b:ro,rw",
        "/a:/b:sqsh+ro",
        "${",
        "${}",
        "${A",
        "${A:-",
        "$${A}",
        "$A",
        "$(id)",
    ),
    *(
        "`id`",
        "~",
        "./x",
        "../../etc/passwd",
        "/dev/zero",
        "/proc/self/mem",
        "/",
        "//",
        "x@sha256:",
        "a@b@c",
        "#",
        "a#b#c:d",
    ),
    *(
        "\x1b[31m",
        "\u202e",
        "x" * 5000,
        "/" * 3000,
        "${A}" * 500,
        ":" * 2000,
        "latest",
        "<user>",
        "{arch}",
        "alpine",
        "cuda12",
    ),
    *(
        "nvcr.io/nvidia/pytorch:99.99-py3",
        "-alps6",
        "true",
        "false",
        "0",
        "^LL128",
        "LL128",
        "hf_" + "a" * 40,
        "a" * 64,
    ),
]
NAMES = [
    *(
        "com.hooks.aws_ofi_nccl.enabled",
        "com.hooks.aws_ofi_nccl.variant",
        "com.hooks.netstack.source",
        "com.hooks.ssh.port",
    ),
    *(
        "com.hooks.netstack.version",
        '"com.hooks.cxi.enabled"',
        "com.hooks.cxi.enabled",
        "com",
        "hooks.x",
        "com.hooks",
        '"."',
    ),
]
ENV = [
    "NCCL_PROTO",
    "NCCL_NET",
    "NCCL_NET_PLUGIN",
    "FI_CXI_RDZV_THRESHOLD",
    "PATH",
    "A",
    "B",
    "HF_TOKEN",
    "image",
    "com",
    '""',
]


def quoted(text: str) -> str:
    return json.dumps(text)


def value(rng: random.Random, depth: int = 0) -> str:
    """A TOML value."""
    kind = rng.randrange(10)
    if kind < 5:
        return quoted(rng.choice(TEXTS))
    if kind == 5:
        return rng.choice(
            ["true", "false", "1", "-1", "1.5", "inf", "nan", "2026-11-25", "07:32:00", "0x" + "f" * 300, "9" * 5000]
        )
    if kind == 6 and depth < 4:
        return "{ " + ", ".join(f"k{n} = {value(rng, depth + 1)}" for n in range(rng.randrange(4))) + " }"
    return "[" + ", ".join(value(rng, depth + 1) for _ in range(rng.randrange(5 if depth < 4 else 1))) + "]"


def hostile(rng: random.Random) -> bytes:
    lines = [f"{rng.choice(KEYS)} = {value(rng)}" for _ in range(rng.randrange(6))]
    if rng.random() < 0.7:
        lines += ["[env]", *(f"{name} = {value(rng)}" for name in rng.sample(ENV, rng.randrange(len(ENV))))]
    if rng.random() < 0.7:
        lines += ["[annotations]", *(f"{name} = {value(rng)}" for name in rng.sample(NAMES, rng.randrange(6)))]
    return "\n".join(lines).encode()


def damaged(rng: random.Random) -> bytes:
    text = bytearray(rng.choice(CORPUS).read_bytes())
    for _ in range(rng.randrange(1, 6)):
        at, length = rng.randrange(len(text) + 1), rng.randrange(12)
        kind = rng.randrange(4)
        if kind == 0:
            text[at : at + length] = b""
        elif kind == 1:
            text[at:at] = rng.choice(TOKENS).encode()
        elif kind == 2 and at < len(text):
            text[at] ^= 1 << rng.randrange(8)
        else:
            text[at:at] = text[at : at + 10 * length]
    return bytes(text)


def huge(rng: random.Random) -> bytes:
    size = rng.choice([1000, 20_000, 100_000, 300_000])
    return rng.choice(
        [
            b"x = " + b"[" * size,
            b"a" + b".a" * (size // 2) + b" = 1",
            b"[" + b"a." * (size // 2) + b"a]",
            b"".join(b"k%d = '%d'\n" % (n, n) for n in range(size // 14)),
            b"[env]\n" + b"".join(b"K%d = '${K%d}'\n" % (n, n + 1) for n in range(size // 20)),
            b"mounts = [" + b"'/a:/b'," * (size // 8) + b"]",
            b"base_environment = [" + b"'a'," * (size // 4) + b"]",
            b'image = "' + b"a/" * (size // 2) + b'"',
            b'image = "' + b"a-" * (size // 2) + b'!"',
            b'image = "' + b"\\u0041" * (size // 6) + b'"',
            b'[env]\nA = "' + b"${A:-" * (size // 5) + b'"',
            b'[env]\nA = "' + b"$" * size + b'"',
            b'[env]\nA = """' + b"\\\\" * (size // 2) + b'"""',
            b'[env]\nA = "' + b"a" * size + b'"',
            b"[env]\n" + b"".join(b'K%d = "%s"\n' % (n, b"a-" * 1024) for n in range(size // 2060)),
            b"[annotations]\n" + b"a" * size + b" = 'x'",
            b"a" * size + b" = 1",
            b'[env]\nURL = "' + b"http://" * (size // 7) + b'"',
            b"[[a]]\n" * (size // 6),
            b"#" * size,
            b" " * size,
            b"\n" * size,
            b"x = " + b"9" * size,
            b"'" * size,
            b'"' * size,
        ]
    )


def encodings(rng: random.Random) -> bytes:
    text = rng.choice(CORPUS).read_text()
    return rng.choice(
        [
            text.encode("utf-16"),
            text.encode("utf-8-sig"),
            text.encode() + b"\xff\xfe",
            text.replace("=", "\x00=", 1).encode(),
            text.replace("\n", "\r").encode(),
            text.replace("\n", "\r\n").encode(),
            text.replace(" ", "\u00a0").encode(),
            b"",
            text.encode("cp037", "replace"),
        ]
    )


DRAW: list[Callable[[random.Random], bytes]] = [
    lambda rng: rng.randbytes(rng.randrange(200)),
    damaged,
    damaged,
    hostile,
    hostile,
    hostile,
    huge,
    encodings,
]


def tangle(rng: random.Random, folder: Path) -> None:
    """Files that inherit from each other, from links, pipes, folders and from nothing."""
    names = [f"f{number}" for number in range(rng.randrange(1, 14))]
    odd = [
        "none",
        "loop",
        "pipe",
        "folder",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "/",
        "",
        "..",
        "./f0.toml",
        "\u202e",
    ]
    for number, name in enumerate(names):
        later = names[number + 1 :] if rng.random() < 0.6 else names
        chosen = [
            rng.choice(later or odd) if rng.random() < 0.85 else rng.choice(odd) for _ in range(rng.randrange(1, 12))
        ]
        chosen = [f"{folder}/{one}.toml" if rng.random() < 0.3 and one in names else one for one in chosen]
        written = quoted(chosen[0]) if rng.random() < 0.5 else "[" + ", ".join(map(quoted, chosen)) + "]"
        base = f"base_environment = {written}\n" if number == 0 or rng.random() < 0.8 else ""
        (folder / f"{name}.toml").write_bytes(
            base.encode() + (hostile(rng) if rng.random() < 0.3 else b"[env]\nA = '1'\n")
        )
    (folder / "loop.toml").symlink_to("loop.toml")
    os.mkfifo(folder / "pipe.toml")
    (folder / "folder.toml").mkdir()


def one_case(number: int, folder: Path) -> None:
    rng = random.Random(number)
    path = folder / "f0.toml"
    if number % 6 == 5:
        tangle(rng, folder)
    else:
        path.write_bytes(rng.choice(DRAW)(rng))
    dialect, site = rng.choice(["ce", "sarus"]), rng.choice([None, "clariden", "bristen"])
    common = ["--dialect", dialect, "--edf-path", str(folder), *(["--site", site] if site else [])]
    check_json = rng.random() < 0.3
    for arguments in (
        ["check", str(path), *common, *(["--json"] if check_json else [])],
        ["effective", str(path), *common],
    ):
        out, err = io.StringIO(), io.StringIO()
        start = time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["edf", *arguments])
        spent = time.process_time() - start
        shown = out.getvalue() + err.getvalue()
        context = f"case {number}: edf {' '.join(arguments)}: {shown[-3000:]}"
        assert code in (0, 2), context
        assert spent < SECONDS, f"{spent} s, {context}"
        assert shown, context
        assert shown.replace("\n", "").isprintable(), context
        if arguments[0] == "check" and check_json:
            tree = json.loads(out.getvalue())
            assert tree["valid"] == (code == 0), context
            for finding in tree["files"][0]["findings"]:
                assert finding["severity"] in ("error", "warning", "note"), context
                assert finding["what"] and finding["why"] and finding["do"], context  # noqa: PT018
        elif code == 2 and arguments[0] == "effective":
            assert err.getvalue().startswith("apertus-nemo: "), context


def run_cases(numbers: range) -> None:
    for number in numbers:
        with tempfile.TemporaryDirectory() as name:
            one_case(number, Path(name))


def test_malformed_files() -> None:
    run_cases(range(500))


@pytest.mark.full
@pytest.mark.timeout(1800)  # on a machine that does much else
def test_malformed_files_many() -> None:
    parts = [range(start, start + 500) for start in range(500, 20_500, 500)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        pool.map(run_cases, parts, chunksize=1)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        document = parse_document(data, "x.toml")
    except Fault:
        return
    for dialect in (CE, SARUS):
        check_document(document, View(dialect))


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.text(alphabet="ab$\\{}:-_\"'`;()A ", max_size=40))
def test_any_text_expands(text: str) -> None:
    for dialect in (CE, SARUS):
        done = expand(text, {"A": "1", "a": "", "AA": "$A"}, dialect)
        assert set(done.missing) <= set(done.names)
        if "$" not in text and "\\" not in text:
            assert done.text == text


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=40), st.text(max_size=80), st.sampled_from(["clariden", "daint", "bristen", "pyxis"]))
def test_any_pin_is_rendered_or_refused(image: str, pin: str, site: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        codes = [
            main(["edf", "render", f"--site={site}", f"--image={pin}", "--", "gh200-1.0.0"]),
            main(["edf", "render", f"--site={site}", "--", image]),
        ]
    assert codes == [2, 2]
    assert out.getvalue() == ""
    assert err.getvalue().replace("\n", "").isprintable()
