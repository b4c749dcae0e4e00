"""A real registry: what we push, skopeo reads; what skopeo pushes, we read."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import INDEX, Descriptor, Index, Platform
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from tests.unit.image.images import PLATFORM, add_image, entry, layout_with, tar
from tests.unit.image.servers import docker_registry, needs

LAYERS = [tar([entry("a", b"a" * 100_000)]), tar([entry("b", bytes(range(256)) * 2000)])]
ARM = Platform("linux", "arm64")


def repository(host: str, name: str, home: dict[str, str], **options: object) -> Repository:
    return Repository(Reference.parse(f"{host}/{name}"), environment=home, **options)  # type: ignore[arg-type]


def test_push_and_pull(registry: str, home: dict[str, str], tmp_path: Path) -> None:
    needs("skopeo")
    layout = layout_with(tmp_path / "l", *LAYERS)
    seen: dict[str, int] = {}
    with repository(registry, "push", home) as remote:
        remote.push(layout, layout.find(), tag="1", progress=seen.__setitem__)
        remote.push(layout, layout.find(), tag="2")  # everything is there
        found = remote.resolve("1")
        assert found.digest == remote.resolve("2").digest == layout.find().digest
        assert sorted(remote.tags()) == ["1", "2"]
        image = remote.image(found, PLATFORM)
        store = BlobStore(tmp_path / "cache")
        remote.download(image.manifest.layers, store, progress=seen.__setitem__)
        assert seen == {one.digest: one.size_bytes for one in (*image.manifest.layers, image.manifest.config)}
        for layer in image.manifest.layers:
            store.check(layer)
    assert list((tmp_path / "cache" / "partial").iterdir()) == []
    reference = f"docker://{registry}/push:1"
    done = subprocess.run(
        ["skopeo", "--override-arch", "amd64", "inspect", "--tls-verify=false", reference],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["Digest"] == found.digest


@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_what_skopeo_pushes(form: str, registry: str, home: dict[str, str], tmp_path: Path) -> None:
    needs("skopeo")
    layout_with(tmp_path / "l", *LAYERS)
    subprocess.run(
        ["skopeo", "--override-arch", "amd64", "--insecure-policy", "copy", "--dest-tls-verify=false"]  # noqa: RUF005
        + ["--format", form, f"oci:{tmp_path}/l:1", f"docker://{registry}/{form}:1"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    with repository(registry, form, home) as remote:
        image = remote.image(remote.resolve("1"), PLATFORM)
        assert image.compressions == ("gzip", "gzip")
        remote.download(image.manifest.layers, BlobStore(tmp_path / "cache"))


def test_an_index_is_pushed_whole(registry: str, home: dict[str, str], tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "l")
    listed = tuple(
        Descriptor(one.media_type, one.digest, one.size_bytes, platform=platform)
        for platform in (PLATFORM, ARM)
        for one in [add_image(layout, LAYERS[:1], tag=None, platform=platform)]
    )
    index = layout.blobs.write(Index(listed).to_bytes(), INDEX)
    with repository(registry, "index", home) as remote:
        remote.push(layout, index, tag="1")
        found = remote.resolve("1")
        assert found == index
        image = remote.image(found, ARM)
        assert (image.descriptor.digest, image.index) == (listed[1].digest, found)
        with pytest.raises(InputError, match=r"has no image for linux/s390x; it has linux/amd64, linux/arm64"):
            remote.image(found, Platform("linux", "s390x"))


def test_referrers(registry: str, home: dict[str, str], tmp_path: Path) -> None:
    """This registry has no referrers API: the tag schema is used."""
    layout = layout_with(tmp_path / "l", *LAYERS)
    with repository(registry, "referrers", home) as remote:
        subject = remote.push(layout, layout.find(), tag="1")
        assert remote.referrers(subject.digest) == ()
        sbom = remote.push_artifact(b'{"sbom":1}', media_type="application/spdx+json", subject=subject)
        lock = remote.push_artifact(
            b'{"lock":1}', media_type="application/json", artifact_type="application/vnd.test.lock", subject=subject
        )
        remote.push_artifact(b'{"sbom":1}', media_type="application/spdx+json", subject=subject)  # no second time
    with repository(registry, "referrers", home) as remote:
        assert {one.digest for one in remote.referrers(subject.digest)} == {sbom.digest, lock.digest}
        (only,) = remote.referrers(subject.digest, "application/vnd.test.lock")
        manifest = remote.artifact(only, subject.digest)
        assert remote.document(manifest.layers[0]) == b'{"lock":1}'


def test_what_is_not_there(registry: str, home: dict[str, str]) -> None:
    with repository(registry, "nothing", home) as remote:
        assert remote.find("1") is None
        with pytest.raises(InputError) as caught:
            remote.resolve("1")
    assert str(caught.value).startswith(f"{registry}/nothing:1: {registry} has no such thing (404): MANIFEST_UNKNOWN")


def test_two_pulls_at_once(registry: str, home: dict[str, str], tmp_path: Path) -> None:
    """Each blob is fetched by one of them."""
    layout = layout_with(tmp_path / "l", *LAYERS, *(tar([entry(str(n), bytes([n]) * 300_000)]) for n in range(6)))
    store = BlobStore(tmp_path / "cache")
    with repository(registry, "two", home) as remote:
        remote.push(layout, layout.find(), tag="1")
    errors: list[BaseException] = []

    def pull() -> None:
        try:
            with repository(registry, "two", home) as remote:
                remote.download(remote.image(remote.resolve("1"), PLATFORM).manifest.layers, store)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=pull) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    for layer in layout.image(PLATFORM).manifest.layers:
        store.check(layer)
    assert list((tmp_path / "cache" / "partial").iterdir()) == []


def test_passwords(home: dict[str, str], tmp_path: Path) -> None:
    """A registry with Basic authentication; the hash is of "secret-word", by bcrypt."""
    import base64

    bcrypt = "$2b$05$abcdefghijklmnopqrstuuUOabO4v2PoT/v47Y.znQK.9MsMDnesq"
    with docker_registry(tmp_path / "registry", htpasswd=f"user:{bcrypt}\n") as host:
        with repository(host, "a", home) as remote, pytest.raises(UnfitEnvironment) as caught:
            remote.resolve("1")
        expected = f"{host}/a:1: {host} wants credentials, and none were found; `podman login {host}` keeps some"
        assert str(caught.value) == expected
        file = tmp_path / "auth.json"
        for word in ("wrong-word", "secret-word"):
            auth = base64.b64encode(f"user:{word}".encode()).decode()
            file.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
            with repository(host, "a", home | {"REGISTRY_AUTH_FILE": str(file)}) as remote:
                if word == "secret-word":
                    assert remote.find("1") is None
                    continue
                with pytest.raises(UnfitEnvironment) as caught:
                    remote.resolve("1")
                assert str(caught.value) == f"{host}/a:1: {host} refuses the credentials from {file}; log in again"
