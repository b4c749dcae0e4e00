"""What buildah, podman and skopeo push, we pull; what we write, skopeo, umoci, podman, unsquashfs and Linux read."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import INDEX, Descriptor, Index, Platform
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from tests.unit.image.engines import Engines
from tests.unit.image.images import PLATFORM, add_image, entry, layout_with, link, tar
from tests.unit.image.servers import needs, needs_mounts
from tests.unit.image.test_merge import ours, theirs
from tests.unit.image.test_publish import PLATFORMS, built

BUSYBOX = Path("/bin/busybox")  # static, from busybox-static
CONFIG = {"Env": ["PATH=/bin", "WORD=b c"], "Cmd": ["/bin/sh", "-c", 'echo "$WORD"; cat /text']}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """A store for the tests of this module."""
    return Engines.create(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this user's credentials or cache."""
    needs("mksquashfs", "unsquashfs")
    for name in list(os.environ):
        if name not in ("PATH", "CI"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def layers(text: bytes) -> list[bytes]:
    """An image that starts: busybox, a file of `text`, links, a whiteout, an owner."""
    first = [entry("bin"), entry("bin/busybox", BUSYBOX.read_bytes(), mode=0o755), link("bin/sh", "busybox")]
    first += [link("bin/cat", "busybox"), entry("old", b"old"), entry("tmp", mode=0o1777)]
    first += [entry("tmp/of", text)]
    second = [entry("text", text, uid=7, gid=8, mode=0o640), link("hard", "text", hard=True), entry(".wh.old", b"")]
    return [_without_padding(tar(first)), _without_padding(tar(second))]


def _without_padding(archive: bytes) -> bytes:
    """As Go writes archives, with two empty blocks at the end and no more.

    skopeo 1.9.3 and podman 4.3.1 leave more of them out of zstd:chunked, and keep the digest of what they had before:
    such a layer is not what the configuration says, and is refused.
    """
    data = archive.rstrip(b"\0")
    return data + bytes(-len(data) % 512 + 1024)


def words() -> bytes:
    """Another text each time, so that no tool's cache of blobs spares a push."""
    return base64.b64encode(os.urandom(3000)) + b"\n"


def pulled(capsys: pytest.CaptureFixture[str], folder: Path, name: str, platform: str = "linux/amd64") -> Path:
    """The `.sqsh` file of what a registry has, unpacked by unsquashfs below `folder/x`."""
    command = ["image", "pull", name, "--platform", platform, "--output", str(folder), "--cache", str(folder / "cache")]
    assert main([*command, "--json"]) == 0, capsys.readouterr().err
    file = Path(json.loads(capsys.readouterr().out)["file"])
    unpack = ["unsquashfs", "-quiet", "-no-progress", "-strict-errors", "-d", str(folder / "x"), str(file)]
    subprocess.run(unpack, check=True, capture_output=True, timeout=60)
    return file


CASES = [
    pytest.param(tool, form, kind, marks=() if quick else pytest.mark.full)
    for tool, form, kind, quick in [
        ("buildah", "oci", "gzip", False),
        ("buildah", "v2s2", "gzip", True),
        ("buildah", "oci", "zstd", False),
        ("podman", "oci", "gzip", False),
        ("podman", "v2s2", "gzip", False),
        ("podman", "oci", "zstd", True),
        ("podman", "oci", "zstd:chunked", False),
        ("skopeo", "oci", "gzip", False),
        ("skopeo", "v2s2", "gzip", False),
        ("skopeo", "oci", "zstd:chunked", True),
        ("skopeo", "oci", "none", True),
    ]
]


@pytest.mark.parametrize(("tool", "form", "kind"), CASES)
def test_what_others_push_is_pulled(
    tool: str, form: str, kind: str, alone: None, engines: Engines, registry: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In OCI's and Docker's forms, however it is compressed. Of Docker's forms these tools push gzip alone."""
    text = words()
    layout_with(tmp_path / "l", *layers(text), config=CONFIG, kind="none")
    place = f"{registry}/interop/{tool}-{form}-{kind.replace(':', '-')}:1"
    name = f"localhost/{tool}{tmp_path.name.lower()}"
    compressed = ["--compression-format", kind] if tool != "skopeo" else ["--dest-compress-format", kind]
    if kind == "none":  # as it stands in the layout: asked to change nothing, skopeo does not compress
        how = ["--preserve-digests", "--dest-tls-verify=false"]
        engines.run("skopeo", "--insecure-policy", "copy", *how, f"oci:{tmp_path}/l:1", f"docker://{place}")
    elif tool == "skopeo":
        how = ["--format", form, "--dest-compress", *compressed, "--dest-tls-verify=false"]
        engines.run("skopeo", "--insecure-policy", "copy", *how, f"oci:{tmp_path}/l:1", f"docker://{place}")
    else:
        engines.run("skopeo", "--insecure-policy", "copy", f"oci:{tmp_path}/l:1", f"containers-storage:{name}")
        how = ["--format", form, *compressed, "--tls-verify=false"]
        engines.run(tool, "push", *how, name, f"docker://{place}")

    with Repository(Reference.parse(place), environment={}) as remote:
        image = remote.image(remote.resolve("1"), PLATFORM)
    assert set(image.compressions) == {kind.partition(":")[0]}
    assert ("docker" in image.descriptor.media_type) == (form == "v2s2")
    assert ("io.containers.zstd-chunked.manifest-position" in image.manifest.layers[0].annotations) == (":" in kind)
    pulled(capsys, tmp_path, place)
    root = tmp_path / "x"
    assert (root / "text").read_bytes() == text
    assert (root / "text").stat().st_ino == (root / "hard").stat().st_ino
    status = (root / "text").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (7, 8, 0o640)
    assert (root / "bin/busybox").read_bytes() == BUSYBOX.read_bytes()
    assert os.readlink(root / "bin/sh") == "busybox"
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert not (root / "old").exists()
    assert (root / "etc/environment").read_text() == "PATH=/bin\nWORD=b c\n"


def test_what_buildah_builds(engines: Engines, tmp_path: Path) -> None:
    """Steps of a Containerfile, a layer each, with files that go and come back: what umoci unpacks."""
    context = tmp_path / "context"
    context.mkdir()
    (context / "busybox").write_bytes(BUSYBOX.read_bytes())
    (context / "Containerfile").write_text(
        "FROM scratch\nCOPY --chmod=0755 busybox /bin/busybox\n"
        'RUN ["/bin/busybox", "--install", "-s", "/bin"]\n'
        "RUN mkdir -p /a/b && echo 1 > /a/b/one && ln /a/b/one /a/hard && ln -s /a /link && chmod 2755 /a\n"
        "RUN rm -r /a/b && rm /bin/vi && echo 2 > /link/two && chown 5:6 /a/two\n"
        "RUN rm -rf /a && mkdir /a && echo 3 > /a/three\n"
    )
    how = ["--isolation", "chroot", "--layers", "--quiet"]
    engines.run("buildah", "bud", *how, "--tag", "localhost/built", context)
    engines.run("buildah", "push", "--quiet", "localhost/built", f"oci:{tmp_path}/l:1")
    layout = Layout.open(tmp_path / "l")
    assert len(layout.image(PLATFORM).manifest.layers) >= 4
    mine, other = ours(layout, tmp_path), theirs(layout, tmp_path)
    assert mine == other
    assert {"a/three", "bin/sh", "link"} <= mine.keys()
    assert not {"a/b", "a/two", "a/hard", "bin/vi"} & mine.keys()


@pytest.mark.parametrize("form", ["oci", pytest.param("v2s2", marks=pytest.mark.full)])
def test_an_index_of_buildah(
    form: str, alone: None, engines: Engines, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two platforms each is pulled, a third is refused with what there is."""
    place, name = f"{registry}/interop/index-{form}:1", f"localhost/index-{form}"
    engines.run("buildah", "manifest", "create", name)
    for processor in ("amd64", "arm64"):
        folder = tmp_path / processor
        layout_with(folder / "l", *layers(processor.encode()), platform=Platform("linux", processor), config=CONFIG)
        copy = ["skopeo", "--insecure-policy", "--override-arch", processor, "copy"]
        engines.run(*copy, f"oci:{folder}/l:1", f"containers-storage:{name}-{processor}")
        engines.run("buildah", "manifest", "add", name, f"{name}-{processor}")
    push = ["buildah", "manifest", "push", "--all", "--tls-verify=false"]
    engines.run(*push, "--format", form, name, f"docker://{place}")
    found = set()
    for processor in ("amd64", "arm64"):
        folder = tmp_path / f"pulled-{processor}"
        found.add(pulled(capsys, folder, place, f"linux/{processor}").name)
        assert (folder / "x/text").read_text() == processor
    assert len(found) == 2
    assert main(["image", "pull", place, "--platform", "linux/s390x", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("has no image for linux/s390x; it has linux/amd64, linux/arm64\n")


@pytest.mark.parametrize(
    "kind", [pytest.param("none", marks=pytest.mark.full), "gzip", pytest.param("zstd", marks=pytest.mark.full)]
)
def test_others_read_our_layouts(kind: str, engines: Engines, tmp_path: Path) -> None:
    """skopeo inspects and copies them, umoci unpacks, podman runs."""
    if kind == "zstd":  # umoci 0.4.7 reads none
        text = b"zstd\n"
        layout_with(tmp_path / "l", *layers(text), config=CONFIG, kind=kind)
    else:
        text = words()
        layout = layout_with(tmp_path / "l", *layers(text), config=CONFIG, kind=kind)
        assert theirs(layout, tmp_path)["text"][4] == text
    layout = Layout.open(tmp_path / "l")
    seen = json.loads(engines.run("skopeo", "--override-arch", "amd64", "inspect", f"oci:{tmp_path}/l:1"))
    assert seen["Digest"] == layout.find().digest
    copy = ["skopeo", "--insecure-policy", "--override-arch", "amd64", "copy", "--preserve-digests"]
    engines.run(*copy, f"oci:{tmp_path}/l:1", f"oci:{tmp_path}/copy:1")
    assert Layout.open(tmp_path / "copy").find().digest == layout.find().digest
    said = engines.run("podman", "run", "--rm", "--network", "none", f"oci:{tmp_path}/l:1")
    assert said.encode() == b"b c\n" + text


def test_others_read_what_we_push(engines: Engines, registry: str, tmp_path: Path) -> None:
    """By tag and by digest, an image alone and one of an index."""
    text = words()
    place = f"{registry}/interop/ours"
    layout = Layout.create(tmp_path / "l")
    listed = []
    for name in PLATFORMS:
        platform = Platform.parse(name)
        one = add_image(layout, layers(text), tag=None, platform=platform, config=CONFIG)
        listed.append(Descriptor(one.media_type, one.digest, one.size_bytes, platform=platform))
    index = layout.blobs.write(Index(tuple(listed)).to_bytes(), INDEX)
    layout.tag(index, "1")
    with Repository(Reference.parse(place), environment={}) as remote:
        remote.push(layout, index, tag="1")
    for name in (f"{place}:1", f"{place}@{listed[0].digest}"):
        pull = ["podman", "pull", "--quiet", "--tls-verify=false", "--arch", "amd64"]
        engines.run(*pull, name)
        assert engines.run("podman", "run", "--rm", "--network", "none", name).encode() == b"b c\n" + text
    copy = ["skopeo", "--insecure-policy", "copy", "--all", "--preserve-digests", "--src-tls-verify=false"]
    engines.run(*copy, f"docker://{place}:1", f"oci:{tmp_path}/copy:1")
    assert Layout.open(tmp_path / "copy").find("1").digest == index.digest


def test_others_read_what_we_publish(
    alone: None, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image under its digest, and its referrers as the tag schema lists them."""
    needs("skopeo")
    place = f"{registry}/interop/published"
    layout = built(tmp_path / "layout")
    (tmp_path / "releases").mkdir()
    assert main(["image", "publish", str(layout.root), place, "--releases", str(tmp_path / "releases")]) == 0
    capsys.readouterr()
    digest = layout.image(PLATFORM, "cpu-1.0.0").descriptor.digest

    def raw(name: str) -> dict[str, object]:
        command = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}"]
        found: dict[str, object] = json.loads(subprocess.check_output(command, timeout=60))
        return found

    listed = raw(f"{place}:{digest.replace(':', '-')}")["manifests"]
    assert isinstance(listed, list)
    kinds = {one["artifactType"]: one["digest"] for one in listed}
    assert set(kinds) == {"application/vnd.cyclonedx+json", "application/vnd.apertus-nemo.image.lock.v1+json"}
    for one in kinds.values():
        assert raw(f"{place}@{one}")["subject"]["digest"] == digest  # type: ignore[index]
    command = ["skopeo", "--insecure-policy", "copy", "--all", "--preserve-digests", "--src-tls-verify=false"]
    subprocess.run([*command, f"docker://{place}:1.0.0", f"oci:{tmp_path}/copy:1"], check=True, timeout=60)
    assert Layout.open(tmp_path / "copy").find("1").digest == layout.find("cpu-1.0.0").digest


def test_others_read_our_squashfs_files(
    alone: None, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """unsquashfs lists names, modes, owners and links; Linux mounts the file and starts what is in it."""
    place = f"{registry}/interop/sqsh"
    layout = layout_with(tmp_path / "l", *layers(b"words\n"), config=CONFIG)
    with Repository(Reference.parse(place), environment={}) as remote:
        remote.push(layout, layout.find(), tag="1")
    file = pulled(capsys, tmp_path, f"{place}:1")
    said = subprocess.check_output(["unsquashfs", "-lln", "-UTC", file], text=True, timeout=60)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "-rw-r----- 7/8 6 2023-11-14 22:13 squashfs-root/text" in lines
    assert "lrwxrwxrwx 0/0 7 2023-11-14 22:13 squashfs-root/bin/sh -> busybox" in lines
    assert "drwxrwxrwt 0/0 25 2023-11-14 22:13 squashfs-root/tmp" in lines
    needs_mounts()
    (tmp_path / "mnt").mkdir()
    script = 'mount -t squashfs -o loop,ro "$1" "$2" && chroot "$2" /bin/sh -c "cat /text /etc/environment"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(file), str(tmp_path / "mnt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "mount:" in done.stderr and "loop" in done.stderr:
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    assert (done.returncode, done.stdout) == (0, "words\nPATH=/bin\nWORD=b c\n"), done.stderr
