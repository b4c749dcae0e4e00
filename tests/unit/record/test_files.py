"""Files are complete or absent; what the disk refuses is said in one line."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.record.files import file_sha256, read_bytes, tree_manifest, write_atomic


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two" * 100_000)
    assert path.read_bytes() == b"two" * 100_000
    assert os.listdir(tmp_path) == ["lock.json"]


def test_the_umask_holds(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A real limit on the size of files; the kernel writes a part, then refuses."""
    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UnfitEnvironment, match=f"could not write {path}: "):
            write_atomic(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_causes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chmod = "choose another folder or its permissions"
    for number, words in (
        (28, "the disk is full; free some space, then run the command again"),
        (122, "the disk quota is used up; free some space, then run the command again"),
        (30, f"the file system is read-only; {chmod}"),
        (13, f"permission denied; {chmod}"),
        (1, f"not permitted; {chmod}"),
        (5, "Input/output error"),
    ):

        def refuse(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            with pytest.raises(UnfitEnvironment) as caught:
                write_atomic(tmp_path / "a", b"x")
        assert str(caught.value) == f"could not write {tmp_path / 'a'}: {words}"
        assert os.listdir(tmp_path) == []
    with pytest.raises(UnfitEnvironment, match="No such file or directory"):
        write_atomic(tmp_path / "absent" / "a", b"x")


def test_killed_while_writing_leaves_one_of_the_two_contents(tmp_path: Path) -> None:
    path = tmp_path / "a"
    script = (
        "import sys; from pathlib import Path; from apertus_nemo.record.files import write_atomic\n"
        "print('go', flush=True)\n"
        "while True:\n for c in b'xy': write_atomic(Path(sys.argv[1]), bytes([c]) * 3_000_000)\n"
    )
    root = Path(__file__).resolve().parents[3]
    for delay in (0.05, 0.11, 0.17):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert process.stdout is not None
        process.stdout.readline()
        timer = threading.Timer(delay, process.kill)
        timer.start()
        process.wait(timeout=60)
        process.stdout.close()
        if path.exists():
            data = path.read_bytes()
            assert data in (b"x" * 3_000_000, b"y" * 3_000_000)


def test_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, size in (("z", 0), ("a/y", 3_000_000), ("a/b/x ü", 7), ("a.b", 1)):
        (tmp_path / name).write_bytes(os.urandom(size))
    manifest = tree_manifest(tmp_path)
    assert list(manifest) == ["a.b", "a/b/x ü", "a/y", "z"]
    listed = subprocess.run(["sha256sum", *manifest], cwd=tmp_path, capture_output=True, check=True).stdout.decode()
    assert {line[66:]: line[:64] for line in listed.splitlines()} == {n: e["sha256"] for n, e in manifest.items()}
    assert {n: e["size_bytes"] for n, e in manifest.items()} == {n: (tmp_path / n).stat().st_size for n in manifest}
    assert file_sha256(tmp_path / "z") == hashlib.sha256().hexdigest()


def test_a_manifest_holds_no_links_and_no_special_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(InputError, match=r"link is neither a file nor a folder"):
        tree_manifest(tmp_path)
    (tmp_path / "link").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is neither"):
        tree_manifest(tmp_path)
    (tmp_path / "pipe").unlink()
    open(os.fsencode(tmp_path) + b"/\xff", "w").close()
    with pytest.raises(InputError, match="is not UTF-8"):
        tree_manifest(tmp_path)


def test_what_cannot_be_read_is_the_users_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could not read .*: No such file"):
        file_sha256(tmp_path / "absent")
    with pytest.raises(InputError, match=r"could not read .*: Is a directory"):
        read_bytes(tmp_path, max_bytes=1)
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(InputError, match="more than the 4 bytes"):
        read_bytes(tmp_path / "a", max_bytes=4)
    assert read_bytes(tmp_path / "a", max_bytes=5) == b"12345"
