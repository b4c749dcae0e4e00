"""Pulls that are stopped and begun again, two at once, a cache that can only be read: by the command, in processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import MANIFEST, Descriptor
from apertus_nemo.image.sqsh import check
from tests.unit.image.images import PLATFORM, entry, layout_with, tar
from tests.unit.image.servers import Request, needs, needs_mounts, server

ROOT = Path(__file__).resolve().parents[3]
SIGNALS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
SENT = [
    signal.SIGKILL,
    pytest.param(signal.SIGINT, marks=pytest.mark.full),
    pytest.param(signal.SIGTERM, marks=pytest.mark.full),
]


class Slow:
    """A registry of one image that sends its layers in drops until `hurry` is set."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.hurry, self.sent = layout, threading.Event(), 0
        self.asked: list[tuple[str, str]] = []  # (digest of a layer, Range)
        self.layers = {one.digest for one in _layers(layout)}

    def __call__(self, request: Request) -> None:
        name = request.path.rpartition("/")[2]
        digest = self.layout.find().digest if name == "1" else name
        path = self.layout.blobs.path(digest)
        if "/referrers/" in request.path or not digest.startswith("sha256:") or not path.is_file():
            request.answer(404)
        elif digest not in self.layers:
            request.answer(200, path.read_bytes(), {"Content-Type": MANIFEST} if "manifests" in request.path else {})
        else:
            wanted = request.headers.get("Range", "")
            self.asked.append((digest, wanted))
            begin, data = int(wanted[6:].rstrip("-") or 0), path.read_bytes()
            headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
            request.answer(206 if begin else 200, b"", headers, length=len(data) - begin)
            for start in range(begin, len(data), 2**17):
                if not request.send(data[start : start + 2**17]):
                    return
                self.sent += 2**17
                self.hurry.wait(0.05)


def _layers(layout: Layout) -> tuple[Descriptor, ...]:
    return layout.image(PLATFORM).manifest.layers


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[str, Slow]]:
    """(reference, the registry behind it), of three layers of 3 MB."""
    needs("mksquashfs", "unsquashfs")
    layers = [tar([entry(f"file{number}", os.urandom(3_000_000))]) for number in range(3)]
    behind = Slow(layout_with(tmp_path / "layout", *layers))
    with server(behind) as host:
        yield f"{host}/slow:1", behind


def begun(folder: Path, name: str, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A pull into `folder/out` and `folder/cache`, on its way."""
    command = [sys.executable, "-m", "apertus_nemo.cli.main", "image", "pull", name, "--platform", "linux/amd64"]
    command += ["--output", str(folder / "out"), "--cache", str(folder / "cache"), "--json", *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*before, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a pull printed; its exit code is `code`, and it wrote no traceback."""
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err.count("\n") <= 1) == (code, True), err
    return out if code == 0 else err


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a moment of a pull."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.002)


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: sent.name)
def test_stopped_while_layers_come(sent: signal.Signals, slow: tuple[str, Slow], tmp_path: Path) -> None:
    """Nothing has its name that is not whole; the next pull goes on from what came, and makes the same file."""
    name, behind = slow
    process = begun(tmp_path, name)
    until(lambda: behind.sent > 3_000_000, process)
    process.send_signal(sent)
    assert ended(process, SIGNALS[sent]) == ""
    assert not (tmp_path / "out").exists()
    store = tmp_path / "cache"
    assert [one for one in behind.layers if (store / "blobs/sha256" / one[7:]).exists()] == []
    assert sum(path.stat().st_size for path in (store / "partial").iterdir()) > 1_000_000
    behind.hurry.set()
    behind.asked.clear()
    found = json.loads(ended(begun(tmp_path, name)))
    assert len(behind.asked) == 3
    assert any(wanted for _, wanted in behind.asked), behind.asked
    assert list((store / "partial").iterdir()) == []
    fresh = json.loads(ended(begun(tmp_path / "fresh", name)))
    assert found["squashfs_sha256"] == fresh["squashfs_sha256"]


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: sent.name)
def test_stopped_while_the_file_is_made(sent: signal.Signals, slow: tuple[str, Slow], tmp_path: Path) -> None:
    """No file has the name; what a kill leaves is swept away once it is old."""
    name, behind = slow
    behind.hurry.set()
    process = begun(tmp_path, name)
    until(lambda: any((tmp_path / "out").glob(".*.partial")), process)
    process.send_signal(sent)
    assert ended(process, SIGNALS[sent]) == ""
    left = list((tmp_path / "out").iterdir())
    assert [path for path in left if not path.name.endswith(".partial")] == []
    assert bool(left) == (sent == signal.SIGKILL)
    for path in left:
        os.utime(path, (0, 0))
    asked = len(behind.asked)
    found = json.loads(ended(begun(tmp_path, name)))
    assert len(behind.asked) == asked  # the layers were there
    file = Path(found["file"])
    assert sorted(os.listdir(tmp_path / "out")) == [file.name, f"{file.name}.json"]
    assert check(file).sha256 == found["squashfs_sha256"]


def test_two_at_once(slow: tuple[str, Slow], tmp_path: Path) -> None:
    """Into one folder by one cache: each layer is fetched once, and both have the file."""
    name, behind = slow
    first, second = begun(tmp_path, name), begun(tmp_path, name)
    until(lambda: behind.sent > 1_000_000, first)
    time.sleep(0.3)
    behind.hurry.set()
    found = [json.loads(ended(one)) for one in (first, second)]
    assert found[0]["squashfs_sha256"] == found[1]["squashfs_sha256"]
    assert sorted(digest for digest, _ in behind.asked) == sorted(behind.layers)
    file = Path(found[0]["file"])
    assert sorted(os.listdir(tmp_path / "out")) == [file.name, f"{file.name}.json"]
    check(file)


def test_a_cache_that_can_only_be_read(slow: tuple[str, Slow], tmp_path: Path) -> None:
    """What it has is used; what it lacks is refused in a line."""
    needs_mounts()
    name, behind = slow
    behind.hurry.set()
    ended(begun(tmp_path, name))
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    read_only = ("unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path / "cache"))
    (next((tmp_path / "out").glob("*.sqsh"))).unlink()
    (next((tmp_path / "out").glob("*.json"))).unlink()
    asked = len(behind.asked)
    found = json.loads(ended(begun(tmp_path, name, before=read_only)))
    assert found["made"] is True
    assert len(behind.asked) == asked
    lacking = sorted(behind.layers)[0]
    (tmp_path / "cache/blobs/sha256" / lacking[7:]).unlink()
    said = ended(begun(tmp_path, name, "--contents", "plain", before=read_only), 3)
    assert said == (
        f"apertus-nemo: could not write {tmp_path}/cache/partial/{lacking[7:]}: the file system is read-only; "
        "choose another folder or its permissions\n"
    )
