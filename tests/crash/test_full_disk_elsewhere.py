"""A full disk under the commands that do not train: one line, exit code 3, and nothing left of what was begun."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.record.files import tree_manifest
from apertus_nemo.testing.ranks import Parent
from tests.crash.small_disk import small_disk
from tests.unit.audit.sealed import make_sealed

ADVICE = "the disk is full; free some space, then run the command again"


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
        shutil.rmtree(store.root)
        disk.free()
        # More tokens than there is room for: full in the middle of corpus.bin.
        build = ["build", "--input", "a.txt", "--tokenizer", f"{corpus}/tokenizer", "--output", f"{disk.folder}/out"]
        [result] = parent.run("tests.cases.data:command", arguments={"arguments": build, "folder": str(tmp_path)})
        assert (result["code"], result["error"]) == (3, f"could not write {disk.folder}/out: {ADVICE}")
        assert list(disk.folder.iterdir()) == []
    assert tree_manifest(run) == before
