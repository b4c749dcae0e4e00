"""Manifests and files at speed: the quick ways say what the strict ones say, or leave it to them."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from apertus_nemo.audit.trees import _hash_batch, _quick_manifest, _strict_manifest, hash_files
from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps

NAMES = ["a", "weights/.metadata", "weights/__0_0.distcp", "weights/x y-[1]~", "z/..z/z.", "~"]


def manifest(names: list[str], *, lock_digest: str | None = "e" * 64, step: int = 12) -> bytes:
    files = {name: {"sha256": f"{number:064x}", "size_bytes": number * 4711} for number, name in enumerate(names)}
    more = {} if lock_digest is None else {"lock_digest": lock_digest}
    return dumps({"files": files, "step": step, "version": 1, **more})


@pytest.mark.parametrize("lock_digest", ["e" * 64, None])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
def test_a_manifest_as_it_is_written_is_read_the_quick_way(names: list[str], lock_digest: str | None) -> None:
    data = manifest(names, lock_digest=lock_digest)
    quick = _quick_manifest(data)
    assert quick is not None
    assert quick == _strict_manifest(data, "it")
    assert list(quick.files) == sorted(names)


@pytest.mark.parametrize(
    "names", [["../x"], ["a/../b"], ["."], ["a//b"], ["/a"], ["a/"], ["a\\b"], ["\u00e9"], ['"'], []]
)
def test_other_names_are_left_to_the_strict_reader(names: list[str]) -> None:
    assert _quick_manifest(manifest(names)) is None


def test_whatever_is_changed_in_it_the_quick_way_never_takes_more(tmp_path: Path) -> None:
    """What the strict reader refuses, the quick one leaves; what it takes, both read alike."""
    whole = manifest(NAMES)
    chance = random.Random(0)
    taken = 0
    for _ in range(20_000):
        data = bytearray(whole)
        position = chance.randrange(len(data))
        kind = chance.randrange(3)
        if kind == 0:
            data[position] = chance.choice(b'0123456789abcdef"{}:,./\\ -e\x00\xff')
        elif kind == 1:
            del data[position : position + chance.randrange(1, 90)]
        else:
            data[position:position] = data[chance.randrange(len(data)) :][: chance.randrange(1, 90)]
        quick = _quick_manifest(bytes(data))
        if quick is not None:
            taken += 1
            assert quick == _strict_manifest(bytes(data), "it")
    assert taken > 1000


def test_small_files_are_read_as_sha256sum_reads_them(tmp_path: Path) -> None:
    sizes = {}
    for number, size in enumerate([0, 1, 100, 4096, 5000, 70_000]):
        name = f"folder-{number % 2}/{number}.bin"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(size))
        sizes[name] = size
    sizes = dict(list(sizes.items())[:5])
    found = list(hash_files(tmp_path, sizes, ordinary=True))
    told = subprocess.run(["sha256sum", *sizes], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=20)
    assert [f"{file.sha256}  {file.name}" for file in found] == told.stdout.splitlines()
    assert found == _hash_batch(tmp_path, list(sizes.items()), False)


@pytest.mark.parametrize("harm", ["longer", "shorter", "gone", "a link", "a folder", "a pipe"])
def test_what_is_not_as_it_was_listed_is_said_in_the_same_words(tmp_path: Path, harm: str) -> None:
    sizes = {"a": 100, "b": 100, "c": 100}
    for name in sizes:
        (tmp_path / name).write_bytes(bytes(100))
    file = tmp_path / "b"
    if harm == "longer":
        file.write_bytes(bytes(101))
    elif harm == "shorter":
        file.write_bytes(bytes(99))
    else:
        file.unlink()
    if harm == "a link":
        file.symlink_to("a")
    elif harm == "a folder":
        file.mkdir()
    elif harm == "a pipe":
        os.mkfifo(file)
    found = list(hash_files(tmp_path, sizes, ordinary=True))
    assert found == _hash_batch(tmp_path, list(sizes.items()), False)
    assert [bool(each.error) for each in found] == [False, True, False]


def test_the_strict_reader_refuses_what_it_refused() -> None:
    with pytest.raises(InputError, match=r"^it: '\.\./x' is not the name of a file in this folder$"):
        _strict_manifest(manifest(["../x"]), "it")
