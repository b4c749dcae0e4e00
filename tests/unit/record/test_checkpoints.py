"""Which checkpoints are taken for whole: each way to be torn or foreign is passed over with one line, and kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps, loads_canonical
from apertus_nemo.record.checkpoints import check_checkpoint, newest_whole
from apertus_nemo.record.files import tree_manifest
from apertus_nemo.record.run_dir import RunDirectory

LOCK = "a" * 64


def make(run: RunDirectory, step: int, *, lock_digest: str | None = LOCK) -> Path:
    """A checkpoint whose files hold what no unpickler would take."""
    folder = run.checkpoint(step)
    (folder / "weights").mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "common.pt"):
        (folder / "weights" / name).write_bytes(f"{name} {step}".encode())
    more = {} if lock_digest is None else {"lock_digest": lock_digest}
    manifest = {"files": tree_manifest(folder), "step": step, "version": 1, **more}
    (folder / "manifest.json").write_bytes(dumps(manifest))
    return folder


def found(run: RunDirectory, *, last_logged: int | None = 9) -> tuple[int | None, list[str]]:
    """What is taken, and the lines about what is passed over."""
    lines: list[str] = []
    return newest_whole(run, lock_digest=LOCK, last_logged=last_logged, warn=lines.append), lines


def edit(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    tree = loads_canonical(path.read_bytes(), what="manifest")
    assert isinstance(tree, dict)
    path.write_bytes(dumps({**tree, **values}))


def test_the_newest(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert found(run) == (None, [])
    for step in (3, 9, 6):
        make(run, step)
    assert found(run) == (9, [])
    assert check_checkpoint(run.checkpoint(6), lock_digest=LOCK) == 6


def test_one_of_before_locks_were_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    make(run, 3, lock_digest=None)
    assert found(run) == (3, [])


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
    "empty manifest": (lambda f: (f / "manifest.json").write_bytes(b""), "manifest.json"),
    "other version": (lambda f: edit(f, version=2), "not the manifest of a checkpoint of version 1"),
    "other step": (lambda f: edit(f, step=6), "holds a checkpoint of step 6"),
    "no files": (lambda f: edit(f, files={}), "names no files"),
    "files of another kind": (lambda f: edit(f, files={"a": 1}), "names no files"),
    "another run": (lambda f: edit(f, lock_digest="b" * 64), "is of another run"),
    "a file is gone": (lambda f: (f / "weights" / "common.pt").unlink(), "weights/common.pt is missing"),
    "a file more": (lambda f: (f / "weights" / "x.pt").touch(), "weights/x.pt is not in the manifest"),
    "cut": (lambda f: (f / "weights" / "common.pt").write_bytes(b"c"), "has 1 bytes, but 11 by the manifest"),
    "changed": (lambda f: (f / "weights" / "common.pt").write_bytes(b"common.pt 8"), "SHA-256"),
    "a link": (
        lambda f: ((f / "weights" / "common.pt").unlink(), (f / "weights" / "common.pt").symlink_to("/dev/null")),
        "neither a file nor a folder",
    ),
    "a file": (lambda f: (shutil.rmtree(f), f.write_bytes(b"")), "is not a checkpoint"),
}


@pytest.mark.parametrize("name", HARM)
def test_passed_over(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path)
    make(run, 6)
    harmed = make(run, 9)
    harm, message = HARM[name]
    harm(harmed)
    step, lines = found(run)
    assert step == 6
    (line,) = lines
    assert message in line
    assert line.endswith("; passed over")
    assert len(line.splitlines()) == 1
    assert harmed.exists()
    with pytest.raises(InputError):
        check_checkpoint(harmed, lock_digest=LOCK)


def test_a_foreign_name(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    make(run, 6)
    (run.checkpoints / "thesis").mkdir()
    assert found(run) == (6, [f"{run.checkpoints}/thesis is not a checkpoint; passed over"])


def test_later_than_the_log(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    make(run, 6)
    make(run, 9)
    step, lines = found(run, last_logged=8)
    assert step == 6
    assert lines == [f"{run.checkpoint(9)} is of a step that was not logged: the log ends at step 8; passed over"]
    assert found(run, last_logged=None)[0] is None
