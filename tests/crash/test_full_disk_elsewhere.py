"""A full or a read-only disk where nothing trains: one line, exit code 3, and nothing left of what was begun."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.families import RELEASES, Release
from apertus_nemo.image.oci import Descriptor
from apertus_nemo.image.publish import _record
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from apertus_nemo.record.files import tree_manifest
from apertus_nemo.testing.ranks import Parent
from tests.crash.small_disk import SmallDisk, small_disk
from tests.integration.runs import STEPS, Run
from tests.unit.audit.sealed import make_sealed
from tests.unit.image.images import entry, layout_with, tar
from tests.unit.image.servers import needs

ADVICE = "the disk is full; free some space, then run the command again"
READ_ONLY = "the file system is read-only; choose another folder or its permissions"


def test_full_under_commands_that_do_not_train(
    tmp_path: Path, parent: Parent, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_sealed(tmp_path / "run", segment_lines=100_000)
    (tmp_path / "a.txt").write_text("arm bear cloud " * 100_000)
    before = tree_manifest(run)
    with small_disk(tmp_path / "disk", size_bytes=2**18) as disk:
        commands = {
            "report.html": ["report", str(run), "--no-verify", "-o", f"{disk.folder}/report.html"],
            "gh200-clariden.toml": ["edf", "render", "gh200", "--site", "clariden", "-o", str(disk.folder)],
        }
        disk.fill()
        for name, arguments in commands.items():
            assert main(arguments) == 3, name
            assert capsys.readouterr() == ("", f"apertus-nemo: could not write {disk.folder}/{name}: {ADVICE}\n")
            assert [path.name for path in disk.folder.iterdir()] == ["ballast"]
        disk.free()
        store = BlobStore(disk.folder / "images")
        first = store.write(b"first", "text/plain")
        disk.fill()
        large = bytes(2**16)
        target = store.path(f"sha256:{hashlib.sha256(large).hexdigest()}")
        with pytest.raises(UnfitEnvironment) as caught:
            store.write(large, "text/plain")
        assert str(caught.value) == f"could not write {target}: {ADVICE}"
        assert [path.name for path in target.parent.iterdir()] == [store.path(first.digest).name]
        with disk.read_only():
            for name, arguments in commands.items():
                assert main(arguments) == 3, name
                assert capsys.readouterr() == ("", f"apertus-nemo: could not write {disk.folder}/{name}: {READ_ONLY}\n")
        shutil.rmtree(store.root)
        disk.free()
        # More tokens than there is room for: full in the middle of corpus.bin.
        build = ["build", "--input", "a.txt", "--tokenizer", f"{corpus}/tokenizer", "--output", f"{disk.folder}/out"]
        [result] = parent.run("tests.cases.data:command", arguments={"arguments": build, "folder": str(tmp_path)})
        assert (result["code"], result["error"]) == (3, f"could not write {disk.folder}/out: {ADVICE}")
        assert list(disk.folder.iterdir()) == []
    assert tree_manifest(run) == before


@pytest.fixture
def pushed(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Descriptor]:
    """(reference, descriptor) of an image with an SBOM in a registry of this machine; its home is empty."""
    needs("mksquashfs")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name = f"{registry}/{tmp_path.name.lower().replace('_', '-')}"
    layout = layout_with(tmp_path / "layout", tar([entry("bin"), entry("bin/sh", os.urandom(300_000), mode=0o755)]))
    with Repository(Reference.parse(name), environment={}) as remote:
        found = remote.push(layout, layout.find(), tag="1")
        remote.push_artifact(b"0" * 9000, media_type="application/spdx+json", subject=found)
    return f"{name}:1", found


def listed(folder: Path) -> list[str]:
    """Every file below a folder, but for the ballast and files that are empty."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(path.relative_to(folder).as_posix() for path in files if path.name != "ballast")


def test_full_under_a_pull(pushed: tuple[str, Descriptor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blobs, squashfs file, sidecar and referrers: what failed is not there, and the same command then ends well."""
    name, _ = pushed
    command = ["image", "pull", name, "--platform", "linux/amd64", "--json"]

    def refused(disk: SmallDisk, *more: str, advice: str = ADVICE) -> str:
        """The file that could not be written, below the disk."""
        assert main([*command, *more]) == 3
        out, err = capsys.readouterr()
        begin, end = f"apertus-nemo: could not write {disk.folder}/", f": {advice}\n"
        assert (out, err.startswith(begin), err.endswith(end), err.count("\n")) == ("", True, True, 1), err
        return err.removeprefix(begin).removesuffix(end)

    with small_disk(tmp_path / "cache-disk", size_bytes=2**20) as disk:
        options = ["--cache", str(disk.folder / "cache"), "--output", str(tmp_path / "out")]
        disk.fill(pages=3)  # for the documents, not for the layer
        assert refused(disk, *options).startswith("cache/blobs/sha256/")
        assert not (tmp_path / "out").exists()
        disk.free()
        assert main([*command, *options]) == 0
        made = json.loads(capsys.readouterr().out)
    file = Path(made["file"]).name
    pages = -(-made["size_bytes"] // 2**12)
    with small_disk(tmp_path / "disk", size_bytes=2**20) as disk:
        options = ["--cache", str(tmp_path / "cache"), "--output", str(disk.folder)]
        disk.fill()
        said = refused(disk, *options)
        assert (said[:1], said[-8:]) == (".", ".partial")
        assert listed(disk.folder) == []
        disk.free()
        disk.fill(pages=pages)
        assert refused(disk, *options) == f"{file}.json"
        assert listed(disk.folder) == []
        disk.free()
        disk.fill(pages=pages + 2)
        assert refused(disk, *options).startswith(f"{file}.referrers/")
        assert listed(disk.folder) == [file, f"{file}.json"]
        disk.free()
        assert main([*command, *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["made"], found["squashfs_sha256"]) == (False, made["squashfs_sha256"])
        assert len(found["referrers"]) == 1
        with disk.read_only():
            aside = ["--cache", str(tmp_path / "cache"), "--output", str(disk.folder / "new")]
            assert refused(disk, *aside, advice=READ_ONLY) == f"new/{file}"
            aside = ["--cache", str(disk.folder / "cache"), "--output", str(tmp_path / "new")]
            assert refused(disk, *aside, advice=READ_ONLY).startswith("cache/blobs/sha256/")
            assert not (tmp_path / "new").exists()


def test_full_under_a_lock_and_under_caches(
    tmp_path: Path,
    parent: Parent,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tree_manifest(Path("containers"))
    with small_disk(tmp_path / "disk", size_bytes=2**20) as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk.folder))
        cache = disk.folder / "apertus-nemo"
        index = {"corpus": str(corpus), "cache": str(disk.folder / "index"), "changes": {"vocab_size": 4096}}

        def refused(advice: str) -> None:
            assert main(["image", "lock", "cpu", "--debian-mirror", "file:///nowhere"]) == 3
            assert capsys.readouterr() == ("", f"apertus-nemo: could not write {cache}/images: {advice}\n")
            [said] = parent.run("tests.cases.data:refused", arguments=index)
            assert said == f"could not write {disk.folder}/index: {advice}"
            [said] = parent.run("tests.cases.data:no_room", arguments={"cache": str(cache / "corpus")})
            assert said.startswith(f"could not write {cache}/corpus")
            assert said.endswith(f": {advice}")

        disk.fill()
        refused(ADVICE)
        assert listed(disk.folder) == []
        disk.free()
        with disk.read_only():
            refused(READ_ONLY)
        assert parent.run("tests.cases.data:refused", arguments=index) == [""]
    assert tree_manifest(Path("containers")) == before


def test_full_under_an_export(runs: Callable[..., Run], parent: Parent, tmp_path: Path) -> None:
    """What is whole of it stays beside, and the same export goes on from there."""
    run = runs("one")
    export: dict[str, object] = {"checkpoint": str(run.directory.checkpoint(STEPS)), "overrides": []}
    export["shard_bytes"] = 2_000_000
    with small_disk(tmp_path / "disk", size_bytes=2**25) as disk:
        out = disk.folder / "out"

        def tried() -> dict[str, object]:
            case = "tests.cases.convert:refused_by_the_disk"
            (answer,) = parent.run(case, arguments={**export, "folder": str(out)})
            return dict(answer)

        where = f"could not write {disk.folder}/.out.partial"
        disk.fill(pages=1200)
        error = f"{where}/.model-00003-of-00004.safetensors.partial: {ADVICE}"
        assert tried() == {"error": error, "exit_code": 3}
        disk.free()
        with disk.read_only():
            refused = tried()
            assert refused["exit_code"] == 3
            assert str(refused["error"]).startswith(where)
            assert str(refused["error"]).endswith(READ_ONLY)
        answer = tried()
        assert [path.name for path in disk.folder.iterdir()] == ["out"]
    (whole,) = parent.run("tests.cases.convert:exported", arguments={**export, "folder": str(tmp_path / "whole")})
    assert answer == whole


def test_full_and_read_only_under_a_release(tmp_path: Path) -> None:
    """What was published stays listed, whole."""
    one = Release(f"sha256:{'a' * 64}", f"sha256:{'b' * 64}", f"sha256:{'c' * 64}", "registry.example/cpu:1.0.0")
    with small_disk(tmp_path / "disk", size_bytes=2**18) as disk:
        _record("1.0.0", {"linux/amd64": one}, disk.folder)
        listed = (disk.folder / RELEASES).read_bytes()
        disk.fill()
        with pytest.raises(UnfitEnvironment) as caught:
            _record("1.1.0", {"linux/amd64": one}, disk.folder)
        assert str(caught.value) == f"could not write {disk.folder / RELEASES}: {ADVICE}"
        with disk.read_only(), pytest.raises(UnfitEnvironment) as caught:
            _record("1.1.0", {"linux/amd64": one}, disk.folder)
        assert str(caught.value) == f"could not write {disk.folder / RELEASES}: {READ_ONLY}"
        assert (disk.folder / RELEASES).read_bytes() == listed
