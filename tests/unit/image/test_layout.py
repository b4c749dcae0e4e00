"""OCI image layouts: ours is read by skopeo, what is wrong with one is said in a line."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.errors import Differs, InputError
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import INDEX, Descriptor, Index, Platform
from tests.unit.image.images import PLATFORM, add_image, entry, layout_with, tar

ARM = Platform("linux", "arm64")
ONE = tar([entry("a", b"a" * 1000)])


def test_inspect_prints_what_skopeo_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = layout_with(tmp_path / "l", ONE, config={"Env": ["A=1"], "Labels": {"x": "a\x1b[31m"}})
    assert main(["image", "inspect", f"{tmp_path}/l:1", "--platform", "linux/amd64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["manifest_digest"] == layout.find().digest
    assert found["environment"] == ["A=1"]
    assert main(["image", "inspect", f"oci:{tmp_path}/l", "--platform", "linux/amd64"]) == 0
    text = capsys.readouterr().out
    assert "label x=a\\x1b[31m\n" in text
    assert f"manifest digest {found['manifest_digest']}\n" in text
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    skopeo = ["skopeo", "--override-arch", "amd64", "inspect", f"oci:{tmp_path}/l:1"]
    seen = json.loads(subprocess.run(skopeo, check=True, capture_output=True, timeout=60).stdout)
    assert (seen["Digest"], seen["Layers"]) == (found["manifest_digest"], [one["digest"] for one in found["layers"]])
    assert (seen["Architecture"], seen["Env"]) == ("amd64", ["A=1"])


def test_of_several_platforms_one_is_chosen(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "l")
    amd, arm = (add_image(layout, [ONE], tag=None, platform=one) for one in (PLATFORM, ARM))
    listed = tuple(
        Descriptor(one.media_type, one.digest, one.size_bytes, platform=platform)
        for one, platform in ((amd, PLATFORM), (arm, ARM))
    )
    layout.tag(layout.blobs.write(Index(listed).to_bytes(), INDEX), "both")
    image = layout.image(ARM, "both")
    assert image.descriptor.digest == arm.digest
    assert image.index is not None
    with pytest.raises(InputError, match=r"l:both has no image for linux/ppc64le; it has linux/amd64, linux/arm64"):
        layout.image(Platform("linux", "ppc64le"), "both")
    with pytest.raises(InputError, match=r"lists no image nope; it lists sha256:.*, both"):
        layout.image(ARM, "nope")
    with pytest.raises(InputError, match="say which image"):
        layout.find()


def test_a_tag_is_moved(tmp_path: Path) -> None:
    layout = layout_with(tmp_path / "l", ONE)
    first = layout.find("1")
    second = add_image(layout, [ONE, ONE])
    assert [one.digest for one in layout.index().manifests] == [second.digest]
    layout.tag(first, "old")
    assert layout.find("old").digest == first.digest


def test_a_changed_blob_is_found(tmp_path: Path) -> None:
    layout = layout_with(tmp_path / "l", ONE)
    image = layout.image(PLATFORM)
    path = layout.blobs.path(image.manifest.config.digest)
    path.write_bytes(path.read_bytes().replace(b"amd64", b"arm64"))
    with pytest.raises(Differs, match="its bytes are not those of its name: it was changed"):
        layout.image(PLATFORM)
    layer = layout.blobs.path(image.manifest.layers[0].digest)
    layout.blobs.check(image.manifest.layers[0])
    layer.write_bytes(layer.read_bytes()[:-1])
    with pytest.raises(Differs, match="its descriptor says"):
        layout.blobs.check(image.manifest.layers[0])


def test_what_is_no_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an OCI image layout"):
        Layout.open(tmp_path)
    layout_with(tmp_path / "l", ONE)
    with pytest.raises(InputError, match="is not empty"):
        Layout.create(tmp_path / "l")


def test_layers_and_diff_ids_must_match(tmp_path: Path) -> None:
    layout = layout_with(tmp_path / "l", ONE, diff_ids=["sha256:" + "0" * 64] * 2)
    with pytest.raises(InputError, match="its manifest has 1 layers, its configuration 2"):
        layout.image(PLATFORM)


def test_unknown_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image"]) == 2
    assert capsys.readouterr().err.startswith("usage: apertus-nemo image SUBCOMMAND")
    assert main(["image", "inspct"]) == 2
    assert capsys.readouterr().err == "apertus-nemo: image: 'inspct' is not a subcommand; did you mean inspect?\n"
