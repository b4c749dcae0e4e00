"""Records that are not even wrong: the commands answer with one line, soon, and never with a fault of their own.

A case is drawn by its number: one file of a small record is made malformed, then `verify` or `compare` is called as a
person would call it. Half of the cases repair every digest afterwards, so that the damage is met behind them. Exit code
4 (or an exception) is a fault of ours and fails the test.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.record.copies import push
from tests.unit.audit.sealed import make_sealed

LOG = "steps/000000.jsonl"
FILES = (
    "lock.json",
    LOG,
    LOG,
    "observed.json",
    "states/step-000000002.json",
    "end.json",
    "attempts/000/seal.json",
    "checkpoints/step-000000002/manifest.json",
    "copy.json",
)
SECONDS = 5.0  # of processor time, in one case; the usual one takes milliseconds
MEMORY_KIB = 400 * 1024  # more than at the start, at most


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def loose(value: Any) -> bytes:
    """JSON, canonical for what is usual, and written for what is not."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


VALUES: list[Callable[[random.Random], Any]] = [
    lambda rng: None,
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice([0, -1, 1, 2**31, 2**53, 2**64, -(2**63), 10**22]),
    lambda rng: rng.choice([0.5, -0.0, 1e300, 1e-7, 1.0]),
    lambda rng: rng.choice(["", "x" * 5000, "\x00", "\u202e\x1b[31m", "é", "\U0001f600", "../../etc/passwd", "0" * 64]),
    lambda rng: [],
    lambda rng: {},
    lambda rng: [[[[[]]]]],
    lambda rng: {"a": {"b": [1, {"c": None}]}},
    lambda rng: [None] * rng.randrange(1, 50),
    lambda rng: {"unknown": "a reason"},
    lambda rng: sha256(bytes([rng.randrange(256)])),
]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        for key in keys:
            found.append((node, key))
            pending.append(node[key])
    return found


def swap_type(rng: random.Random, data: bytes) -> bytes:
    """Another kind of value at one place, or a key more, or less, or renamed."""
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        container, key = rng.choice(places(tree) or [([tree], 0)])
        kind = rng.randrange(5)
        if kind < 3 or isinstance(container, list):
            container[key] = rng.choice(VALUES)(rng)
        elif kind == 3:
            container[rng.choice(["", "more", "a" * 3000, "../x", "é", "\x00"])] = container.pop(key)
        else:
            del container[key]
    return loose(tree)


RAW = [
    b"", b"\x00", b"\xff\xfe", b"{", b"[", b"}", b'"', b"null", b"NaN", b"Infinity", b"1e999", b"-0", b"1" * 400,
    b'{"a":1,"a":2}', b"[" * 100_000, b'{"a":' * 50_000, b"\xed\xa0\x80", b'"\\ud800"', b"\r\n", b"\n\n\n", b"0.1e-400",
    b"9" * 30 + b".5", b"\xf4\x90\x80\x80", b"// x", b"\\u0000", b" ", b"\t", b"1_000", b"\xef\xbb\xbf",
]  # fmt: skip


def bytes_harm(rng: random.Random, data: bytes) -> bytes:
    """Bits, pieces and strange bytes."""
    kind, at = rng.randrange(8), rng.randrange(len(data) + 1)
    if kind == 0 and data:
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 4, 40))):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.choice(RAW) + data[at:]
    if kind == 3:
        return rng.choice(RAW)
    if kind == 4:
        return data[:at] + rng.randbytes(rng.randrange(1, 200)) + data[at:]
    if kind == 5:
        return data[at:] + data[:at]
    if kind == 6:
        end = min(len(data), at + rng.randrange(1, 300))
        return data[:at] + rng.choice(RAW) + data[end:]
    return data[:at] + data[at : at + 400] * rng.choice((2, 50)) + data[at:]


def line_harm(rng: random.Random, data: bytes) -> bytes:
    """One line of a log, by its values or its bytes."""
    lines = data.split(b"\n")
    index = rng.randrange(max(1, len(lines) - 1))
    if rng.random() < 0.6:
        try:
            lines[index] = swap_type(rng, lines[index])
        except ValueError:
            pass
    elif rng.random() < 0.5:
        new = rng.choice([b'"nan"', b'"-inf"', b'"0x1p-1074"', b'"0x1.0000000000000p+9999"', b"1e5", b'"1.5"', b"[]"])
        lines[index] = lines[index].replace(b'"0x1.4000000000000p+2"', new).replace(b'"learning_rate":"0x', b'"x":"', 1)
    else:
        lines[index] = bytes_harm(rng, lines[index])
    return b"\n".join(lines)


def harm(rng: random.Random, name: str, data: bytes) -> bytes:
    if rng.random() < 0.4:
        return bytes_harm(rng, data)
    return line_harm(rng, data) if name == LOG else swap_type(rng, data)


def parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def repair(files: dict[str, bytes]) -> None:
    """Make every digest agree with what is there now, as far as that still means something."""
    state = parsed(files["states/step-000000002.json"])
    state_digest = None
    if isinstance(state, dict) and "tensors" in state:
        state_digest = state["digest"] = sha256(loose(state["tensors"]))
        files["states/step-000000002.json"] = loose(state)
    previous, lines = "", []
    for number, line in enumerate(files[LOG].split(b"\n")[:-1]):
        tree = parsed(line)
        if isinstance(tree, dict):
            if number == 0:
                tree |= {
                    "lock_digest": sha256(files["lock.json"]),
                    "observation_digest": sha256(files["observed.json"]),
                }
            else:
                tree["previous"] = previous
                if tree.get("step") == 2 and state_digest:
                    tree["state_digest"] = state_digest
            line = loose(tree)
        previous = sha256(line)
        lines.append(line)
    files[LOG] = b"".join(line + b"\n" for line in lines)
    for name in ("attempts/000/seal.json", "end.json"):
        seal = parsed(files[name])
        if not isinstance(seal, dict):
            continue
        if name == "end.json" and lines:
            seal |= {"header": sha256(lines[0]), "last_line": previous, "lines": len(lines)}
        if isinstance(seal.get("files"), dict):
            seal["files"] = {key: sha256(files[key]) if key in files else value for key, value in seal["files"].items()}
        seal.pop("digest", None)
        files[name] = loose({**seal, "digest": sha256(loose(seal))})
    manifest = parsed(files["copy.json"])
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        for key, entry in manifest["files"].items():
            if key in files and isinstance(entry, dict):
                entry |= {"sha256": sha256(files[key]), "size_bytes": len(files[key])}
        files["copy.json"] = loose(manifest)


class Bench:
    """A record that is damaged and healed, beside an undamaged one."""

    def __init__(self, folder: Path) -> None:
        made = make_sealed(folder / "made", steps=3, saved=(2,), segment_lines=100_000)
        push(made, str(folder / "good"))
        self.good, self.path = folder / "good", folder / "run"
        shutil.copytree(self.good, self.path)
        self.files = {str(p.relative_to(self.path)): p.read_bytes() for p in self.path.rglob("*") if p.is_file()}

    def call(self, arguments: list[str]) -> tuple[int, str]:
        """(exit code, standard error); nothing that is printed drives a terminal."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        told = out.getvalue() + err.getvalue()
        assert told.replace("\n", "").isprintable(), f"{arguments}: {told[:2000]!r}"
        assert len(told) < 50_000, f"{arguments}: {len(told)} characters"
        return code, err.getvalue()

    def case(self, number: int) -> None:
        rng = random.Random(number)
        files = dict(self.files)
        name = rng.choice(FILES)
        files[name] = harm(rng, name, files[name])
        if rng.random() < 0.5:
            repair(files)
        changed = [key for key in files if files[key] != self.files[key]]
        for key in changed:
            (self.path / key).write_bytes(files[key])
        if rng.random() < 0.7:
            arguments = ["verify", str(self.path)]
        else:
            arguments = ["compare", str(self.path), str(self.good)]
        if rng.random() < 0.2:
            arguments.append("--json")
        started = time.process_time()
        try:
            code, told = self.call(arguments)
        finally:
            for key in changed:
                (self.path / key).write_bytes(self.files[key])
        spent = time.process_time() - started
        assert code in (0, 1, 2), f"case {number} ({name}): exit code {code}: {told[-2000:]}"
        assert "Traceback" not in told, f"case {number} ({name})"
        assert spent < SECONDS, f"case {number} ({name}) took {spent:.1f} s"


def some(first: int, last: int) -> int:
    """Run cases in a process of its own; how many."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        bench = Bench(Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, last):
            bench.case(number)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < MEMORY_KIB, f"memory grew by {grown} KiB"
    return last - first


def test_the_record_is_whole_before(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.call(["verify", str(bench.path)])[0] == 0
    assert bench.call(["compare", str(bench.path), str(bench.good)])[0] == 0
    files = dict(bench.files)
    repair(files)
    assert files == bench.files  # repairing what is whole changes nothing


def test_two_thousand_malformed_records() -> None:
    assert some(0, 2000) == 2000


@pytest.mark.full
@pytest.mark.timeout(1800)  # on a machine that does much else
def test_a_hundred_thousand_malformed_records() -> None:
    """On every processor; under three minutes on two."""
    parts = [(first, first + 1000) for first in range(0, 100_000, 1000)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        assert sum(pool.starmap(some, parts)) == 100_000


@pytest.mark.parametrize("name", [*dict.fromkeys(FILES), "recipe.yaml", "source.tar"])
@pytest.mark.parametrize("kind", ["folder", "zero", "pipe", "dangling", "missing"])
def test_what_is_not_a_file(tmp_path: Path, name: str, kind: str) -> None:
    """Nothing is followed, waited for, or read without end."""
    bench = Bench(tmp_path)
    place = bench.path / name
    place.unlink()
    if kind == "folder":
        place.mkdir()
    elif kind == "zero":
        place.symlink_to("/dev/zero")
    elif kind == "dangling":
        place.symlink_to("/nowhere")
    elif kind == "pipe":
        os.mkfifo(place)
    code, told = bench.call(["verify", str(bench.path)])
    assert code == (0 if (name, kind) == ("copy.json", "missing") else 1), told
    code, told = bench.call(["compare", str(bench.path), str(bench.good)])
    assert code in (0, 2), told
    assert "Traceback" not in told


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name",
    [
        "lock.json",
        LOG,
        "end.json",
        "states/step-000000002.json",
        "copy.json",
        "source.tar",
        "recipe.yaml",
        "checkpoints/step-000000002/weights/__0_0.distcp",
        "attempts/000/rank-0.log",
    ],
)
def test_a_file_without_end(tmp_path: Path, name: str) -> None:
    """A sparse terabyte is not read to its end, and takes no memory."""
    bench = Bench(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(bench.path / name, "r+b") as stream:
        stream.truncate(2**30 if name == LOG else 2**40)
    started = time.process_time()
    code, told = bench.call(["verify", str(bench.path)])
    assert code == 1, told
    code, told = bench.call(["compare", str(bench.path), str(bench.good)])
    assert code == (2 if name in (LOG, "lock.json", "end.json", "states/step-000000002.json") else 0), told
    assert time.process_time() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


@pytest.mark.parametrize("what", ["absent", "file", "empty", "foreign"])
def test_what_is_no_record(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "it"
    if what == "file":
        place.write_text("x")
    elif what != "absent":
        place.mkdir()
        if what == "foreign":
            (place / "notes.txt").write_text("x")
    assert main(["verify", str(place)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"apertus-nemo: {place} is not ")
    assert shown.err.count("\n") == 1
