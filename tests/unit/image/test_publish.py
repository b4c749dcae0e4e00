"""Publishing to a real registry: what is pushed comes back with `pull`, a version never changes, signatures hold."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.image.families import containers_folder, read_releases
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.lock import parse_lock
from apertus_nemo.image.oci import INDEX, Descriptor, Index, Platform
from apertus_nemo.image.publish import LOCK, LOCK_LABEL, REVISION_LABEL
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from apertus_nemo.image.signature import STATEMENT, pre_authentication
from tests.unit.image.images import add_image, entry, tar
from tests.unit.image.servers import needs

LOCK_BYTES = (containers_folder() / "cpu" / "lock.json").read_bytes()
LABELS = {LOCK_LABEL: parse_lock(LOCK_BYTES, what="lock").digest, REVISION_LABEL: "0" * 40}
PLATFORMS = ("linux/amd64", "linux/arm64")
EDF_TEXT = 'image = "x"\n'


def built(folder: Path, *, content: bytes = b"a", labels: dict[str, str] | None = None, papers: bool = True) -> Layout:
    """As `image build` leaves it: the lock and a bill of materials inside, an index of both platforms."""
    layout = Layout.create(folder)
    files = [entry("etc/apertus-nemo/lock.json", LOCK_BYTES), entry("etc/apertus-nemo/sbom.cdx.json", b'{"bom":1}')]
    layers = [tar([entry("a", content)]), tar([entry("etc"), entry("etc/apertus-nemo"), *(files if papers else [])])]
    config = {"Labels": LABELS if labels is None else labels}
    listed = []
    for name in PLATFORMS:
        platform = Platform.parse(name)
        one = add_image(layout, layers, tag=f"cpu-1.0.0-{platform.architecture}", platform=platform, config=config)
        listed.append(Descriptor(one.media_type, one.digest, one.size_bytes, platform=platform))
    layout.tag(layout.blobs.write(Index(tuple(listed)).to_bytes(), INDEX), "cpu-1.0.0")
    return layout


@pytest.fixture
def place(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository of the test's own; its home and its list of releases are empty."""
    for name in list(os.environ):
        if name not in ("PATH", "CI"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "releases").mkdir()
    return f"{registry}/publish/{tmp_path.name.lower().replace('_', '-')}"


def published(place: str, layout: Layout, *arguments: str) -> int:
    releases = str(layout.root.parent / "releases")
    return main(["image", "publish", str(layout.root), place, "--releases", releases, *arguments])


def keys(folder: Path, name: str, kind: str = "ed25519") -> tuple[Path, Path]:
    """(private, public) of openssl."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    curve = ["-pkeyopt", "ec_paramgen_curve:P-256"] if kind == "EC" else []
    subprocess.run(["openssl", "genpkey", "-algorithm", kind, *curve, "-out", private], check=True, timeout=60)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, timeout=60)
    return private, public


@pytest.mark.parametrize("kind", ["ed25519", "EC"])
def test_what_was_published_is_pulled(
    kind: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lock, SBOM, EDF and signature come with the image; openssl checks the signature too."""
    needs("mksquashfs", "openssl")
    layout = built(tmp_path / "layout")
    private, public = keys(tmp_path, "mine", kind)
    (tmp_path / "cpu-daint.toml").write_text(EDF_TEXT)
    edf = ["--edf", str(tmp_path / "cpu-daint.toml")]
    assert published(place, layout, "--sign", str(private), *edf) == 0
    assert "published" in capsys.readouterr().out
    release = read_releases(tmp_path / "releases")["1.0.0"]
    assert {name: one.manifest_digest for name, one in release.items()} == {
        name: layout.image(Platform.parse(name), "cpu-1.0.0").descriptor.digest for name in PLATFORMS
    }
    assert {one.reference for one in release.values()} == {f"{place}:1.0.0"}

    command = ["image", "pull", f"{place}:1.0.0", "--platform", "linux/arm64", "--output", str(tmp_path / "out")]
    assert main([*command, "--key", str(public), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["manifest_digest"] == release["linux/arm64"].manifest_digest
    assert found["signed_by"] == str(public)
    folder = Path(f"{found['file']}.referrers")
    files = {
        one["files"][0]["name"].split("-", 1)[1]: (folder / one["files"][0]["name"]).read_bytes()
        for one in found["referrers"]
    }
    assert files["lock.json"] == LOCK_BYTES
    assert files["sbom.cdx.json"] == b'{"bom":1}'
    assert files["cpu-daint.toml"] == EDF_TEXT.encode()
    assert len(files) == 4

    envelope = json.loads(files["signature.dsse.json"])
    payload = base64.b64decode(envelope["payload"])
    said = json.loads(payload)
    assert said["subject"][0]["digest"]["sha256"] == found["manifest_digest"].removeprefix("sha256:")
    assert said["predicate"] == {
        "commit": "0" * 40, "lock_digest": LABELS[LOCK_LABEL], "platform": "linux/arm64"
    }  # fmt: skip
    (tmp_path / "data").write_bytes(pre_authentication(payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    rawin = ["-rawin", *(["-digest", "sha256"] if kind == "EC" else [])]
    subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, *rawin, "-in", tmp_path / "data",
         "-sigfile", tmp_path / "sig"],
        check=True, timeout=60, capture_output=True,
    )  # fmt: skip


def test_a_published_version_never_changes(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = built(tmp_path / "layout")
    assert published(place, layout) == 0
    written = (tmp_path / "releases" / "releases.json").read_bytes()
    with Repository(Reference.parse(place), environment={}) as remote:
        first = remote.resolve("1.0.0")
        referrers = remote.referrers(layout.image(Platform.parse("linux/amd64"), "cpu-1.0.0").descriptor.digest)
    assert published(place, layout) == 0  # again: everything is there
    capsys.readouterr()
    other = built(tmp_path / "other", content=b"b")
    assert published(place, other) == 2
    assert "was published as sha256:" in (told := capsys.readouterr().err)
    assert told.count("\n") == 1
    assert "raise the version in image.toml\n" in told
    (tmp_path / "releases" / "releases.json").unlink()
    assert published(place, other) == 2  # of the registry alone
    assert f"{place}:1.0.0 is {first.digest} already and means that for ever" in capsys.readouterr().err
    with Repository(Reference.parse(place), environment={}) as remote:
        assert remote.resolve("1.0.0").digest == first.digest
        assert remote.tags() == tuple(sorted(remote.tags()))
        assert [one for one in remote.tags() if not one.startswith("sha256-")] == ["1.0.0"]
        there = remote.referrers(layout.image(Platform.parse("linux/amd64"), "cpu-1.0.0").descriptor.digest)
        assert there == referrers
        assert remote.find(other.image(Platform.parse("linux/amd64"), "cpu-1.0.0").descriptor.digest) is None
    assert published(place, layout) == 0
    assert (tmp_path / "releases" / "releases.json").read_bytes() == written


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: built(folder, papers=False), "is not an image of ours: it holds no etc/apertus-nemo/lock.json"),
        (lambda folder: built(folder, labels={}), "is not the digest of the lock inside: build it again"),
        (
            lambda folder: built(folder, labels={LOCK_LABEL: LABELS[LOCK_LABEL]}),
            "names no commit, so nobody could build it again",
        ),
        (Layout.create, "lists nothing"),
    ],
)
def test_what_is_not_published(
    make: Callable[[Path], Layout], expected: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = make(tmp_path / "layout")
    assert published(place, layout) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert told.count("\n") == 1
    with Repository(Reference.parse(place), environment={}) as remote:
        assert remote.find("1.0.0") is None
    assert not (tmp_path / "releases" / "releases.json").exists()


def test_keys_that_do_not_fit(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image of nobody, of somebody else, with a signature of another image, and files that are no keys."""
    needs("mksquashfs", "openssl")
    layout = built(tmp_path / "layout")
    private, public = keys(tmp_path, "mine")
    theirs = keys(tmp_path, "theirs")[0]
    rsa = keys(tmp_path, "rsa", "RSA")
    pull = ["image", "pull", f"{place}:1.0.0", "--platform", "linux/amd64", "--output", str(tmp_path / "out"), "--key"]

    assert published(place, layout, "--sign", str(rsa[0])) == 2
    assert "is a key of another kind: make one with" in capsys.readouterr().err
    assert published(place, layout, "--sign", str(public)) == 2
    assert "is not a private key in PEM form without a password" in capsys.readouterr().err
    assert published(place, layout) == 0
    assert main([*pull, str(public)]) == 1
    assert f"is not signed by {public}: it has no signature\n" in capsys.readouterr().err
    assert published(place, layout, "--sign", str(theirs)) == 0
    capsys.readouterr()
    assert main([*pull, str(public)]) == 1
    assert f"it is not signed by {public}\n" in capsys.readouterr().err

    # A signature of ours, of another image, that somebody hangs on this one.
    other = built(tmp_path / "other", content=b"b")
    assert published(f"{place}/other", other, "--sign", str(private), "--releases", str(tmp_path)) == 0
    amd64 = Platform.parse("linux/amd64")
    target = layout.image(amd64, "cpu-1.0.0").descriptor
    stolen_from = other.image(amd64, "cpu-1.0.0").descriptor.digest
    with Repository(Reference.parse(f"{place}/other"), environment={}) as remote:
        (one,) = remote.referrers(stolen_from, STATEMENT)
        envelope = remote.document(remote.artifact(one, stolen_from).layers[0])
    with Repository(Reference.parse(place), environment={}) as remote:
        remote.push_artifact(envelope, media_type="application/x", artifact_type=STATEMENT, subject=target)
        remote.push_artifact(b"[]", media_type="application/x", artifact_type=STATEMENT, subject=target)
    capsys.readouterr()
    assert main([*pull, str(public)]) == 1
    assert f"is not signed by {public}: " in capsys.readouterr().err
    for key, message in ((tmp_path / "gone", "gone"), (rsa[1], "another kind"), (private, "is not a public key")):
        assert main([*pull, str(key)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert published(place, layout, "--sign", str(private)) == 0
    assert main([*pull, str(public)]) == 0


def test_a_lock_of_another_image(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("mksquashfs")
    layout = built(tmp_path / "layout")
    assert published(place, layout) == 0
    target = layout.image(Platform.parse("linux/amd64"), "cpu-1.0.0").descriptor
    with Repository(Reference.parse(place), environment={}) as remote:
        remote.push_artifact(b"{}", media_type=LOCK, subject=target)
    command = ["image", "pull", f"{place}:1.0.0", "--platform", "linux/amd64", "--output", str(tmp_path)]
    assert main(command) == 1
    assert f"it was built from {LABELS[LOCK_LABEL]}\n" in capsys.readouterr().err
