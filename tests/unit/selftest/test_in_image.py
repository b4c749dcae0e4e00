"""`image verify`: a self-test inside an image that is not started. The images here are a shell and what it answers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.image.inside import opened
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.squashfs import find_tool, make_squashfs
from apertus_nemo.selftest.in_image import _PREFIX, _work
from tests.unit.image.images import PLATFORM, entry, layout_with, tar
from tests.unit.image.tools import needs
from tests.unit.selftest import roots

ALL_WELL = {"checks": [{"name": "python packages", "reason": "2 as in the lock", "state": "ok"}]}
WRONG = {"checks": [{"name": "python packages", "reason": "numpy is 1.26.3, the lock says 1.26.4", "state": "failed"}]}


def image(folder: Path, answer: str, code: int = 0, *, lock: bytes | None = None, label: str | None = None) -> Path:
    """A layout of an image whose self-test prints `answer` and ends with `code`."""
    needs("busybox", "mksquashfs")
    ours = roots.lock()
    program = f"#!/bin/busybox sh\nbusybox cat /answer\nexit {code}\n"
    names = ("bin", "dev", "etc", "etc/apertus-nemo", "opt", "opt/apertus-nemo", "opt/apertus-nemo/bin", "proc", "tmp")
    entries = [
        *(entry(name) for name in names),
        entry("bin/busybox", Path(shutil.which("busybox") or "").read_bytes(), mode=0o755),
        entry("opt/apertus-nemo/bin/apertus-nemo", program.encode(), mode=0o755),
        entry("answer", answer.encode()),
        entry("etc/apertus-nemo/image.toml", roots.DEFINITION.encode()),
        entry("etc/apertus-nemo/lock.json", ours.to_bytes() if lock is None else lock),
    ]
    labels = {"ai.apertus.image.lock": ours.digest if label is None else label}
    layout_with(folder, tar(entries), config={"Labels": labels, "Env": ["PATH=/bin"]})
    return folder


def verified(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """(exit code, what --json printed, errors) of the command."""
    code = main(["image", "verify", "--json", "--platform", "linux/amd64", "--time-limit", "60", *arguments])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else None, said.err


def test_an_image_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image(tmp_path / "layout", json.dumps(ALL_WELL))
    code, tree, _ = verified(capsys, str(folder))
    digest = Layout.open(folder).image(PLATFORM).descriptor.digest
    assert code == 0
    assert (tree["image"], tree["manifest_digest"], tree["verdict"]) == ("cpu-1.2.3", digest, "ok")
    assert [(check["name"], check["state"]) for check in tree["checks"]] == [
        ("file", "ok"),
        ("lock", "ok"),
        ("python packages", "ok"),
    ]
    assert main(["image", "verify", "--platform", "linux/amd64", f"oci:{folder}:1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok           python packages: 2 as in the lock"


def test_an_image_whose_self_test_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, tree, _ = verified(capsys, str(image(tmp_path / "layout", json.dumps(WRONG), 1)))
    assert (code, tree["verdict"]) == (1, "failed")
    assert tree["checks"][-1]["reason"] == "numpy is 1.26.3, the lock says 1.26.4"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("", 1),
        ("done", 0),
        ("[]", 0),
        ('{"checks": []}', 0),
        ('{"checks": [{"name": "a", "state": "fine", "reason": "b"}]}', 0),
        ('{"checks": [{"name": "a", "state": "ok", "reason": 1}]}', 0),
        (json.dumps(WRONG), 0),
        (json.dumps(ALL_WELL), 1),
        ("[" * 100_000, 0),
    ],
)
def test_a_self_test_that_does_not_answer_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str, code: int
) -> None:
    found, tree, _ = verified(capsys, str(image(tmp_path / "layout", answer, code)))
    assert found == 1
    assert tree["checks"][-1] == {
        "name": "self-test",
        "reason": f"it ended with {code}: without a word",
        "state": "failed",
    }


def test_an_answer_does_not_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"checks": [{"name": "a\x1b[2J", "reason": "b\n\x1b]0;c\x07", "state": "ok"}]}
    assert main(["image", "verify", "--platform", "linux/amd64", str(image(tmp_path / "l", json.dumps(answer)))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == r"ok           a\x1b[2J: b\n\x1b]0;c\x07"


def test_an_image_of_another_lock_than_its_label_says_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = f"sha256:{'0' * 64}"
    code, tree, _ = verified(capsys, str(image(tmp_path / "layout", json.dumps(ALL_WELL), label=label)))
    assert code == 1
    reason = f"the lock in the image is {roots.lock().digest}, its label says {label}"
    assert tree["checks"][-1] == {"name": "lock", "reason": reason, "state": "failed"}


def test_what_is_no_image_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("mksquashfs")
    layout_with(tmp_path / "layout", tar([entry(name) for name in ("dev", "proc", "tmp")]))
    message = f"apertus-nemo: {tmp_path}/layout is no image of apertus-nemo: it holds no /etc/apertus-nemo/lock.json\n"
    assert verified(capsys, str(tmp_path / "layout")) == (2, None, message)
    bad = image(tmp_path / "bad", "", lock=b"{}")
    message = f"apertus-nemo: {bad}: /etc/apertus-nemo/lock.json: is not the lock of an image\n"
    assert verified(capsys, str(bad)) == (2, None, message)


def test_a_squashfs_file_and_a_changed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from apertus_nemo.image.sqsh import describe, hashes, write_sidecar

    layout = Layout.open(image(tmp_path / "layout", json.dumps(ALL_WELL)))
    found, path = layout.image(PLATFORM), tmp_path / "cpu.sqsh"
    made = make_squashfs(layout.blobs, found, path, tool=find_tool(os.environ))
    code, tree, _ = verified(capsys, str(path))
    assert (code, tree["manifest_digest"]) == (0, None)
    assert tree["checks"][0] == {"name": "file", "reason": "cpu.sqsh has no sidecar", "state": "not checked"}
    write_sidecar(path, describe(hashes(path), found, made, contents="enroot", reference="registry.example/cpu:1"))
    code, tree, _ = verified(capsys, str(path))
    assert (code, tree["manifest_digest"]) == (0, found.descriptor.digest)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, tree, _ = verified(capsys, str(path))
    assert (code, tree["checks"][0]["state"], len(tree["checks"])) == (1, "failed", 2)  # nothing of it was run


def test_a_file_that_starts_knows_its_manifest(tmp_path: Path) -> None:
    """The one fact that an image cannot hold is in the file that is made of it, for locks of runs; only in ours."""
    ours = Layout.open(image(tmp_path / "ours", ""))
    others = layout_with(tmp_path / "others", tar([entry(name) for name in ("dev", "proc", "tmp")]))
    names = ("etc/apertus-nemo/manifest-digest", "etc/environment")
    read = []
    for number, layout in enumerate((ours, others)):
        found = layout.image(PLATFORM)
        path, work = tmp_path / f"{number}.sqsh", tmp_path / f"work-{number}"
        make_squashfs(layout.blobs, found, path, tool=find_tool(os.environ))
        work.mkdir()
        with opened(path, work=work) as root:
            read.append(root.read(*names))
    assert read[0] == {names[0]: f"{ours.image(PLATFORM).descriptor.digest}\n".encode(), names[1]: b"PATH=/bin\n"}
    assert read[1] == {names[0]: None, names[1]: b""}


def test_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    left = tmp_path / "tmp" / f"{_PREFIX}of-a-killed-one"
    left.mkdir()
    (left / "held").write_bytes(b"")
    (left / "image.sqsh").write_bytes(bytes(1000))
    with _work() as held:  # of one that is at work
        code, _, _ = verified(capsys, str(image(tmp_path / "layout", json.dumps(ALL_WELL))))
        assert code == 0
        assert list((tmp_path / "tmp").iterdir()) == [held]
    assert list((tmp_path / "tmp").iterdir()) == []
