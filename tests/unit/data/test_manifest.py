"""The check of a built corpus: every byte counts, and it costs neither numpy nor torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.data import manifest as manifests
from apertus_nemo.errors import Differs, InputError


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    """A corpus to damage."""
    return Path(shutil.copytree(corpus, tmp_path / "copy"))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_whole_corpus_verifies(corpus: Path) -> None:
    manifest = manifests.verify(corpus)
    assert manifest == manifests.load(corpus)
    assert [entry.path for entry in manifest.files] == [
        "corpus.bin",
        "corpus.idx",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer == manifests.TokenizerInfo("trained", 300, bos_id=1, eos_id=2, pad_id=3, unk_id=0)
    assert set(manifest.built_with) == {"apertus-nemo", "megatron-core", "tokenizers"}


def test_sums_are_those_of_sha256sum(corpus: Path) -> None:
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum here")
    subprocess.run([tool, "-c", "manifest.sha256"], cwd=corpus, check=True, capture_output=True, timeout=60)
    manifest = manifests.load(corpus)
    names = [entry.path for entry in manifest.files]
    done = subprocess.run([tool, *names], cwd=corpus, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [f"{entry.sha256}  {entry.path}" for entry in manifest.files]
    line = subprocess.run([tool, "manifest.json"], cwd=corpus, check=True, capture_output=True, text=True, timeout=60)
    assert line.stdout.split()[0] == manifests.digest(manifest)


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(copy: Path) -> None:
    for name in files(copy):
        path = copy / name
        good = path.read_bytes()
        for place in sorted({0, len(good) // 2, len(good) - 1}):
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            with pytest.raises(Differs) as difference:
                manifests.verify(copy)
            assert name.replace("manifest.sha256", "manifest.json") in str(difference.value), place
            assert "\n" not in str(difference.value)
        path.write_bytes(good)
    manifests.verify(copy)


def test_a_missing_or_shorter_or_added_file_is_found(copy: Path) -> None:
    index = copy / "corpus.idx"
    good = index.read_bytes()
    index.write_bytes(good[:-1])
    with pytest.raises(Differs, match=rf"corpus.idx: has {len(good) - 1} bytes, the manifest says {len(good)}$"):
        manifests.verify(copy)
    index.unlink()
    with pytest.raises(Differs, match=r"corpus.idx: missing, but the manifest names it$"):
        manifests.verify(copy)
    index.write_bytes(good)
    added = copy / "tokenizer" / "added_tokens.json"
    added.write_text("{}")
    with pytest.raises(Differs, match=r"added_tokens.json: the manifest does not name this file"):
        manifests.verify(copy)
    added.unlink()
    (copy / "index-cache").mkdir()
    (copy / "index-cache" / "anything").write_text("training puts its index here")
    manifests.verify(copy)


def rewrite(folder: Path, change: dict[str, object]) -> None:
    """A forged manifest whose own sum is right."""
    import hashlib

    tree = json.loads((folder / "manifest.json").read_bytes()) | change
    data = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, " is not the manifest of a corpus (format is 'other'): build it again"),
        ({"version": 2}, " is not the manifest of a corpus (version is 2, known here is 1): build it again"),
        ({"files": []}, " is not the manifest of a corpus (the list of files is incomplete): build it again"),
        ({"tokens": -1}, " is not the manifest of a corpus (bad counts): build it again"),
        ({"documents": 7}, ": its counts are not those of corpus.idx: build the corpus again"),
        ({"tokens": 7}, ": its counts are not those of corpus.idx: build the corpus again"),
    ],
)
def test_a_forged_manifest_is_refused(copy: Path, change: dict[str, object], reason: str) -> None:
    rewrite(copy, change)
    with pytest.raises(InputError) as refusal:
        manifests.verify(copy)
    assert str(refusal.value) == f"{copy / 'manifest.json'}{reason}"


def test_a_manifest_cannot_name_files_elsewhere(copy: Path) -> None:
    tree = json.loads((copy / "manifest.json").read_bytes())
    for path in ("../secret", "/etc/passwd", "a/b/c", "tokenizer/../x", "zzz\n"):
        rewrite(copy, {"files": [*tree["files"], {"path": path, "size_bytes": 1, "sha256": "0" * 64}]})
        with pytest.raises(InputError, match="is not the manifest of a corpus"):
            manifests.verify(copy)


def test_folders_that_are_no_corpus(tmp_path: Path, copy: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError) as refusal:
            manifests.verify(folder)
        assert str(refusal.value) == (
            f"{folder} is not a built corpus: it has no manifest.json; make one with `apertus-nemo data build`"
        )
    (copy / "manifest.sha256").unlink()
    with pytest.raises(InputError, match=r"it has no manifest\.sha256"):
        manifests.verify(copy)


def test_verify_loads_neither_numpy_nor_torch(corpus: Path) -> None:
    code = (
        "import sys; from apertus_nemo.cli.data import main; code = main(['verify', sys.argv[1]]);"
        "print(sorted({'numpy', 'torch', 'megatron', 'tokenizers', 'fsspec'} & set(sys.modules))); sys.exit(code)"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus)], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert lines[0] == f"verified {corpus}: 4 files"
    assert lines[-2] == f"  manifest digest sha256:{manifests.digest(manifests.load(corpus))}"
