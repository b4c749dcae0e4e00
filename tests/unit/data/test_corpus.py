"""The embedded corpus: what is in it, and that several processes may ask for it at once."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pytest

from apertus_nemo.data import corpus, manifest
from apertus_nemo.errors import Differs, InputError
from apertus_nemo.testing.ranks import Parent


def test_texts_are_the_documentation_and_the_library() -> None:
    from pydoc_data.topics import topics

    documents = list(corpus.texts())
    names = [name for name, _ in documents]
    assert len(set(names)) == len(names)
    assert dict(documents)["topics/lambda"].decode() == topics["lambda"]
    library = Path(argparse.__file__).parent
    for name, data in documents:
        if name.startswith("library/"):
            assert data == (library / name.removeprefix("library/")).read_bytes(), name
    assert {name[8] for name in names if name.startswith("library/")} >= set(
        "abcdehilmnopstuwz"
    )  # all over the alphabet
    assert sum(name.startswith("topics/") for name in names) == len(topics)
    total = sum(len(data) for _, data in documents)
    assert corpus.MINIMUM_BYTES <= total <= corpus.MAXIMUM_BYTES
    parts = {part for name in names for part in name.split("/")[1:-1]}
    assert not parts & {"test", "tests", "idlelib", "site-packages", "encodings"}
    assert not [name for name in names if "_sysconfigdata" in name]
    assert all(data.decode("utf-8") for _, data in documents)
    assert documents == list(corpus.texts())


def test_two_at_once_build_one_and_damage_is_refused(parent: Parent, tmp_path: Path) -> None:
    arguments = {"cache": str(tmp_path / "cache"), "vocab_size": 320}
    first, second = parent.run("tests.cases.data:embed", world_size=2, arguments=arguments)
    assert first.pop("seconds") < 3.0  # verified, not built again; the target of 0.3 s is a benchmark's matter
    assert second.pop("seconds") < 3.0
    assert first == second
    assert first["same"]
    assert first["tokens"] > 1_500_000
    assert first["inputs"] == [[name, hashlib.sha256(data).hexdigest()] for name, data in corpus.texts()]
    folder = Path(first["folder"])
    assert [path.name for path in sorted((tmp_path / "cache").iterdir()) if path.is_dir()] == [folder.name]
    assert manifest.digest(manifest.verify(folder)) == first["digest"]
    data = bytearray((folder / "corpus.bin").read_bytes())
    data[1234] ^= 4
    (folder / "corpus.bin").write_bytes(data)
    with pytest.raises(Differs, match=rf"corpus\.bin: its SHA-256 is .*; remove {folder} to have it built again$"):
        corpus.embedded(tmp_path / "cache", 320)


def test_a_vocabulary_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be at least 260"):
        corpus.embedded(tmp_path / "cache", 100)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
