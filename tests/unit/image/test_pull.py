"""From a registry to a squashfs file, by the command: found, checked, made the same again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.errors import Differs
from apertus_nemo.image.lustre import LAYOUT, on_lustre, stripe
from apertus_nemo.image.oci import INDEX, Descriptor, Index, Platform
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from apertus_nemo.image.sqsh import check
from apertus_nemo.image.squashfs import find_tool, make_squashfs
from tests.integration.command import apertus, on_a_terminal, shell
from tests.unit.image.images import PLATFORM, add_image, entry, layout_with, link, tar
from tests.unit.image.servers import needs

LAYERS = [
    tar([entry("bin"), entry("bin/sh", os.urandom(300_000), mode=0o755), entry("data", b"0" * 9_000_000)]),
    tar([link("bin/ash", "bin/sh", hard=True), entry("etc"), entry("etc/environment", b"OLD=1\n")]),
]
CONFIG = {
    "Env": ["PATH=/bin", "A=b c"],
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["echo 'it''s'"],
    "WorkingDir": "/work dir",
    "Labels": {"version": "1\n2"},
    "Volumes": {"/data": {}},
}


@pytest.fixture
def pushed(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Descriptor]:
    """(reference, descriptor) of an image in a repository of the test's own; its home is empty."""
    needs("mksquashfs", "unsquashfs")
    for name in list(os.environ):
        if name not in ("PATH", "CI"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name = f"{registry}/pull/{tmp_path.name.lower().replace('_', '-')}"
    layout = layout_with(tmp_path / "layout", *LAYERS, config=CONFIG)
    with Repository(Reference.parse(name), environment={}) as remote:
        return f"{name}:1", remote.push(layout, layout.find(), tag="1")


def pulled(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["image", "pull", "--platform", "linux/amd64", "--json", *arguments]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_pull_and_check(pushed: tuple[str, Descriptor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, descriptor = pushed
    first = pulled(capsys, name, "--output", str(tmp_path / "a"))
    path = Path(str(first["file"]))
    digits = descriptor.digest.removeprefix("sha256:")[:12]
    assert path.name.endswith(f"-1-{digits}.sqsh")
    assert first["manifest_digest"] == descriptor.digest
    assert first["squashfs_sha256"] == subprocess.check_output(["sha256sum", path], text=True).split()[0]
    assert first["made"] is True
    assert sorted(os.listdir(tmp_path / "a")) == [path.name, f"{path.name}.json"]
    again = pulled(capsys, name, "--output", str(tmp_path / "a"))
    assert again == {**first, "made": False}
    assert main(["image", "pull", "--platform", "linux/amd64", name, "--output", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{path} is there already, and whole: {path.stat().st_size:,} bytes"
    )
    other = pulled(capsys, name.replace(":1", f"@{descriptor.digest}"), "--output", str(tmp_path / "b"))
    assert other["squashfs_sha256"] == first["squashfs_sha256"]
    assert main(["image", "check", str(path), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["manifest_digest"] == descriptor.digest
    assert main(["image", "inspect", name, "--platform", "linux/amd64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest_digest"] == descriptor.digest


def test_the_files_of_enroot(
    pushed: tuple[str, Descriptor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They replace what the image has, and its rc starts the entrypoint with its command, quoted."""
    name, descriptor = pushed
    path = pulled(capsys, name, "--output", str(tmp_path / "a"))["file"]
    subprocess.run(["unsquashfs", "-q", "-n", "-d", tmp_path / "x", str(path)], check=True, capture_output=True)
    etc = tmp_path / "x" / "etc"
    assert (etc / "environment").read_text() == "PATH=/bin\nA=b c\n"
    assert (etc / "fstab").read_text() == "${ENROOT_ROOTFS}/data /data none x-create=dir,bind,rw,nosuid,nodev\n"
    rc = (etc / "rc").read_text()
    assert rc.startswith(f"# enroot-provenance: {descriptor.digest}\n# version 1 2\n")
    folder = tmp_path / "work dir"
    folder.mkdir()
    rc = rc.replace("'/work dir'", f"'{folder}'").replace("/etc/rc.local", "/nonexistent")
    (tmp_path / "rc").write_text(rc)
    for words, expected in (([], "its"), (["pwd"], str(folder)), (["echo $0", "a b"], "a b")):
        assert subprocess.check_output(["/bin/sh", tmp_path / "rc", *words], text=True).strip() == expected
    plain = pulled(capsys, name, "--output", str(tmp_path / "a"), "--contents", "plain")["file"]
    assert "-plain-" in str(plain)
    shown = subprocess.check_output(["unsquashfs", "-cat", str(plain), "etc/environment"])
    assert shown == b"OLD=1\n"


def test_a_flipped_byte_is_found(
    pushed: tuple[str, Descriptor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(str(pulled(capsys, pushed[0], "--output", str(tmp_path))["file"]))
    data = bytearray(path.read_bytes())
    size = len(data)
    for position in (0, size // 2, size - 1):
        data[position] ^= 1
        path.write_bytes(data)
        assert main(["image", "check", str(path)]) == 1
        expected = f"apertus-nemo: {path} was changed: bytes 0 to {size - 1:,} are not what was made; pull it again\n"
        assert capsys.readouterr().err == expected
        data[position] ^= 1
    path.write_bytes(data[:-1])
    with pytest.raises(Differs, match="is cut off: it has"):
        check(path)
    path.write_bytes(data)
    assert main(["image", "check", str(path), "--sha256", "0" * 64]) == 1
    assert "is not the file that was asked for" in capsys.readouterr().err
    sidecar = path.with_name(f"{path.name}.json")
    text = sidecar.read_text()
    sidecar.write_text(text.replace('"format":1', '"format": 1'))
    assert main(["image", "check", str(path)]) == 2
    assert "is not canonical JSON" in capsys.readouterr().err
    sidecar.unlink()
    assert main(["image", "check", str(path)]) == 2
    assert "has no sidecar: there is no" in capsys.readouterr().err
    assert main(["image", "pull", "--platform", "linux/amd64", pushed[0], "--output", str(tmp_path)]) == 2
    assert "is there and has no sidecar" in capsys.readouterr().err


def test_the_chunk_is_named(tmp_path: Path) -> None:
    """A file of several chunks; the sidecar is written around it."""
    needs("mksquashfs")
    layout = layout_with(tmp_path / "l", tar([entry("random", os.urandom(10_000_000))]))
    image = layout.image(PLATFORM)
    from apertus_nemo.image import sqsh

    path = tmp_path / "a.sqsh"
    made = make_squashfs(layout.blobs, image, path, tool=find_tool(os.environ))
    sqsh.write_sidecar(path, sqsh.describe(sqsh.hashes(path), image, made, contents="enroot", reference="a"))
    check(path)
    data = bytearray(path.read_bytes())
    data[5_000_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(Differs, match="was changed: bytes 4,194,304 to 8,388,607 are not what was made; pull it again"):
        check(path)


def test_the_same_bytes_anywhere(pushed: tuple[str, Descriptor], tmp_path: Path) -> None:
    """One and two processors, another umask, clock, temporary folder, locale, user."""
    name, _ = pushed
    cache = tmp_path / "cache"
    found = set()
    command = [
        sys.executable,
        "-m",
        "apertus_nemo.cli.main",
        "image",
        "pull",
        name,
        "--platform",
        "linux/amd64",
        "--json",
    ]
    root = str(Path(__file__).resolve().parents[3])
    for number, (prefix, more) in enumerate(
        [
            ([], {}),
            (["taskset", "-c", "0"], {"SOURCE_DATE_EPOCH": "12345", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8"}),
            (["sh", "-c", 'umask 0077; exec "$@"', "sh"], {"TMPDIR": str(tmp_path)}),
        ]
    ):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": root, **more}
        done = subprocess.run(
            [*prefix, *command, "--output", str(tmp_path / str(number)), "--cache", str(cache)],
            env=environment,
            capture_output=True,
            timeout=100,
            check=True,
        )
        found.add(json.loads(done.stdout)["squashfs_sha256"])
    assert len(found) == 1


def test_a_terminal_sees_progress_and_a_pipe_nothing(pushed: tuple[str, Descriptor], tmp_path: Path) -> None:
    arguments = ["image", "pull", pushed[0], "--platform", "linux/amd64", "--output"]
    environment = shell(tmp_path / "cache", tmp_path / "home")
    code, out, drawn = on_a_terminal([*arguments, "a"], folder=tmp_path, environment=environment)
    assert (code, out[:7]) == (0, "made a/"), drawn
    assert re.search(r"layers: +[0-9.]+[kM]?B", drawn), drawn
    assert "making the squashfs file" in drawn
    done = apertus([*arguments, "b"], folder=tmp_path, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_network(
    pushed: tuple[str, Descriptor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest that the cache has, even where the cache can only be read; a damaged blob is fetched again."""
    name, descriptor = pushed
    cache = tmp_path / "cache"
    arguments = ["--cache", str(cache), "--no-referrers"]
    first = pulled(capsys, name, "--output", str(tmp_path / "a"), *arguments)
    away = f"127.0.0.1:1/nowhere@{descriptor.digest}"
    other = pulled(capsys, away, "--output", str(tmp_path / "b"), *arguments)
    assert other["squashfs_sha256"] == first["squashfs_sha256"]
    blobs = sorted((cache / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blobs[-1].read_bytes())
    data[-1] ^= 1
    blobs[-1].write_bytes(data)
    pinned = f"{name.rpartition(':')[0]}@{descriptor.digest}"
    again = pulled(capsys, pinned, "--output", str(tmp_path / "c"), *arguments)
    assert again["squashfs_sha256"] == first["squashfs_sha256"]


def test_referrers_come_along(
    pushed: tuple[str, Descriptor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, descriptor = pushed
    with Repository(Reference.parse(name), environment={}) as remote:
        remote.push_artifact(b'{"spdx":1}', media_type="application/spdx+json", subject=descriptor)
    found = pulled(capsys, name, "--output", str(tmp_path))
    folder = Path(f"{found['file']}.referrers")
    (one,) = json.loads((folder / "referrers.json").read_text())["referrers"]
    assert found["referrers"] == [one]
    assert one["artifact_type"] == "application/spdx+json"
    assert (folder / one["files"][0]["name"]).read_bytes() == b'{"spdx":1}'


def test_the_titles_of_referrers_name_no_other_place(
    pushed: tuple[str, Descriptor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, descriptor = pushed
    titles = ["../../evil", "/evil", "a/b", "\x1b[31m", ".", "x" * 300]
    with Repository(Reference.parse(name), environment={}) as remote:
        for number, title in enumerate(titles):
            remote.push_artifact(b"%d" % number, media_type="text/plain", subject=descriptor, title=title)
    found = pulled(capsys, name, "--output", str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [Path(str(found["file"])).name + end for end in ("", ".json", ".referrers")]
    )
    files = sorted(path.name for path in Path(f"{found['file']}.referrers").iterdir())
    assert [len(one) for one in files[:-1]] == [12] * len(titles)  # digits of the digest alone
    assert not (tmp_path / "evil").exists()


def test_of_an_index_the_platform(
    registry: str, pushed: tuple[str, Descriptor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = layout_with(tmp_path / "two", *LAYERS[:1])
    platform = Platform("linux", "arm64")
    arm = add_image(layout, LAYERS[:1], platform=platform)
    index = Index((Descriptor(arm.media_type, arm.digest, arm.size_bytes, platform=platform),))
    with Repository(Reference.parse(f"{registry}/two"), environment={}) as remote:
        remote.push(layout, layout.blobs.write(index.to_bytes(), INDEX), tag="1")
    assert main(["image", "pull", f"{registry}/two:1", "--platform", "linux/amd64", "--output", str(tmp_path)]) == 2
    assert "has no image for linux/amd64; it has linux/arm64\n" in capsys.readouterr().err
    assert main(["image", "pull", f"{registry}/two:1", "--platform", "linux/arm64", "--output", str(tmp_path)]) == 0
    assert "for linux/arm64\n  squashfs sha256:" in capsys.readouterr().out


def test_what_was_not_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "pull", "gh200-0.0.1"]) == 2
    assert capsys.readouterr().err.startswith("apertus-nemo: gh200 has no version 0.0.1; there are gh200-")
    assert main(["image", "pull", "nothing-1.0.0"]) == 2
    assert capsys.readouterr().err == (
        "apertus-nemo: there is no family of images 'nothing'; there are cpu, gh200. An image of a registry is named "
        "with its registry and tag, as in docker.io/library/nothing:TAG\n"
    )
    assert main(["image", "pull", "cpu-1.0.0", "--platform", "linux/amd64"]) == 2
    assert capsys.readouterr().err == (
        "apertus-nemo: cpu-1.0.0 for linux/amd64 was never published: build it (apertus-nemo image build cpu), or name "
        "a reference, HOST/NAME:TAG\n"
    )


@pytest.mark.parametrize("key", ["Env", "WorkingDir"])
def test_a_configuration_that_enroot_cannot_hold(
    key: str, tmp_path: Path, registry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = ["A=1\nB=2"] if key == "Env" else "/a\nb"
    layout = layout_with(tmp_path / "l", *LAYERS, config={key: value})
    with Repository(Reference.parse(f"{registry}/odd"), environment={}) as remote:
        remote.push(layout, layout.find(), tag=key.lower())
    arguments = [
        "image",
        "pull",
        f"{registry}/odd:{key.lower()}",
        "--platform",
        "linux/amd64",
        "--output",
        str(tmp_path),
    ]
    assert main([*arguments, "--cache", str(tmp_path / "cache")]) == 2
    assert f"its configuration has a line break in {key}, which Enroot's files cannot hold" in capsys.readouterr().err
    assert [name for name in os.listdir(tmp_path) if "sqsh" in name] == []


def test_striping(tmp_path: Path) -> None:
    """Which file system a path is on; `lfs` is a script here: no Lustre was at hand."""
    mounts = f"/dev/a / ext4 rw 0 0\n10.0.0.1@tcp:/x {tmp_path}/capstor\\040x lustre rw 0 0\n"
    (tmp_path / "capstor x").mkdir()
    assert on_lustre(tmp_path / "capstor x" / "image.sqsh", mounts)
    assert not on_lustre(tmp_path / "capstor", mounts)
    script = tmp_path / "lfs"
    script.write_text('#!/bin/sh\nprintf "%s " "$@" > "$0.log"; eval "last=\\${$#}"; : > "$last"\n')
    script.chmod(0o755)
    target = tmp_path / "capstor x" / "a.sqsh"
    assert stripe(target, {"PATH": f"{tmp_path}:/usr/bin:/bin"}, mounts)
    assert target.exists()
    assert (tmp_path / "lfs.log").read_text() == " ".join(["setstripe", *LAYOUT, str(target), ""])
    assert not stripe(tmp_path / "b.sqsh", {"PATH": str(tmp_path)}, mounts)
    assert not stripe(target, {"PATH": "/usr/bin:/bin"}, mounts)
