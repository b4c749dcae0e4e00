"""What a person sees of a published version: listed, pulled by name, held against its release, pinned in an EDF."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.image import families
from apertus_nemo.image.families import containers_folder
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from apertus_nemo.record.canonical import dumps
from tests.unit.image.servers import needs
from tests.unit.image.test_publish import LABELS, LOCK_BYTES, LOCK_LABEL, PLATFORMS, built

AMD64 = "linux/amd64"


@pytest.fixture
def published(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Layout, Path]:
    """(repository, layout, a copy of `containers/` with the release in it) of cpu-1.0.0; the home is empty."""
    needs("mksquashfs")
    for name in list(os.environ):
        if name not in ("PATH", "CI"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "containers"
    shutil.copytree(containers_folder(), folder, ignore=shutil.ignore_patterns("releases.json"))
    monkeypatch.setattr(families, "containers_folder", lambda: folder)
    place = f"{registry}/version/{tmp_path.name.lower().replace('_', '-')}"
    layout = built(tmp_path / "layout")
    assert main(["image", "publish", str(layout.root), place, "--releases", str(folder / "cpu")]) == 0
    return place, layout, folder


def digest(layout: Layout, platform: str = AMD64) -> str:
    return layout.image(Platform.parse(platform), "cpu-1.0.0").descriptor.digest


def test_listed(published: tuple[str, Layout, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Published ones with their digests, unbuilt ones with what their locks do not hold yet."""
    place, layout, _ = published
    capsys.readouterr()
    assert main(["image", "list"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    lines = first.splitlines()
    assert lines[0] == "cpu-1.0.0  published  Apertus on CPUs"
    assert lines[1] == "  for any x86-64 or aarch64 machine with Linux"
    for platform in PLATFORMS:
        assert f"    {place}:1.0.0 {digest(layout, platform)}" in lines
    assert lines[2].startswith("  linux/amd64: torch 2.13.0+cpu, nemo-toolkit 2.7.3, megatron-core 0.15.3, numpy ")
    assert second.startswith("gh200-1.0.0  unbuilt  Apertus on GH200\n  for GH200 nodes (aarch64)")
    assert "  not resolved: " in second
    assert main(["image", "list", "--json"]) == 0
    cpu, gh200 = json.loads(capsys.readouterr().out)
    assert cpu["platforms"][AMD64]["manifest_digest"] == digest(layout)
    assert (cpu["state"], gh200["state"], gh200["platforms"]["linux/arm64"]["manifest_digest"]) == (
        "published", "unbuilt", None
    )  # fmt: skip
    assert cpu["unresolved"] == []
    assert any("could not be reached" in line for line in gh200["unresolved"])


def test_an_older_version_stays(published: tuple[str, Layout, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Its digests are in the list when the definition has gone on; what was in it, only the registry says."""
    place, layout, folder = published
    definition = folder / "cpu/image.toml"
    definition.write_text(definition.read_text().replace('version = "1.0.0"', 'version = "1.1.0"', 1))
    capsys.readouterr()
    assert main(["image", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cpu-1.0.0  published  Apertus on CPUs" in lines
    assert "cpu-1.1.0  unbuilt  Apertus on CPUs" in lines
    assert f"    {place}:1.0.0 {digest(layout)}" in lines
    assert main(["image", "inspect", "cpu-1.0.0", "--platform", AMD64, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest_digest"] == digest(layout)


def test_pulled_by_its_name(
    published: tuple[str, Layout, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the digest of its release, wherever its tag points now; with the lock that it was built from."""
    place, layout, _ = published
    other = built(tmp_path / "other", content=b"evil")
    with Repository(Reference.parse(place), environment={}) as remote:
        remote.push(other, other.find("cpu-1.0.0"), tag="1.0.0")  # somebody moves the tag
    capsys.readouterr()
    command = ["image", "pull", "cpu-1.0.0", "--platform", AMD64, "--output", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    path = Path(found["file"])
    assert path.name == f"cpu-1.0.0-{digest(layout)[7:19]}.sqsh"
    assert found["manifest_digest"] == digest(layout)
    assert found["notes"] == []
    (lock,) = (path.parent / f"{path.name}.referrers").glob("*lock.json")
    assert lock.read_bytes() == LOCK_BYTES

    # A mirror is asked for the same digest, or has nothing.
    with Repository(Reference.parse(f"{place}/mirror"), environment={}) as remote:
        remote.push(layout, layout.find("cpu-1.0.0"))
    assert main([*command, "--from", f"{place}/mirror", "--cache", str(tmp_path / "cache")]) == 0
    mirrored = json.loads(capsys.readouterr().out)
    assert (mirrored["manifest_digest"], mirrored["made"]) == (digest(layout), False)
    assert mirrored["notes"] == [f"the lock that it was built from ({LABELS[LOCK_LABEL]}) is not among its referrers"]
    assert main([*command, "--from", f"{place}/none", "--cache", str(tmp_path / "cache2")]) == 2
    assert f"apertus-nemo: {place}/none@{digest(layout)}: " in capsys.readouterr().err
    assert main([*command, "--from", f"{place}/mirror:1"]) == 2
    assert "write the host and the name alone" in capsys.readouterr().err


def test_a_release_that_says_otherwise(
    published: tuple[str, Layout, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, layout, folder = published
    path = folder / "cpu/releases.json"
    tree = json.loads(path.read_bytes())
    config = tree["1.0.0"][AMD64]["config_digest"]
    tree["1.0.0"][AMD64]["config_digest"] = f"sha256:{'0' * 64}"
    path.write_bytes(dumps(tree))
    capsys.readouterr()
    assert main(["image", "pull", "cpu-1.0.0", "--platform", AMD64, "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"apertus-nemo: {place}:1.0.0@{digest(layout)} has the configuration {config}, cpu-1.0.0 was published with "
        f"sha256:{'0' * 64}\n"
    )
    assert not (tmp_path / "out").exists()


def test_pinned_in_an_edf(
    published: tuple[str, Layout, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the release, or by the file that was pulled; the name of the EDF has no dots."""
    place, layout, _ = published
    edfs = tmp_path / "edfs"
    edfs.mkdir()
    assert main(["edf", "render", "cpu-1.0.0", "--site", "bristen", "--output", str(edfs)]) == 0
    assert [file.name for file in edfs.iterdir()] == ["cpu-1-0-0.toml"]
    assert tomllib.loads((edfs / "cpu-1-0-0.toml").read_text())["image"] == f"{place}@{digest(layout)}"
    command = ["image", "pull", "cpu-1.0.0", "--platform", AMD64, "--output", str(tmp_path / "out"), "--json"]
    capsys.readouterr()
    assert main(command) == 0
    file = json.loads(capsys.readouterr().out)["file"]
    assert main(["edf", "render", "cpu-1.0.0", "--site", "bristen", "--image", file, "--output", str(edfs)]) == 0
    assert tomllib.loads((edfs / "cpu-1-0-0.toml").read_text())["image"] == file
    assert digest(layout) in (edfs / "cpu-1-0-0.toml").read_text()
    assert main(["edf", "check", str(edfs / "cpu-1-0-0.toml"), "--site", "bristen", "--strict"]) == 0
    assert main(["edf", "render", "cpu-1.0.0", "--site", "daint", "--image", file]) == 2
