"""Files written as a stream, against the library that everybody reads them with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from apertus_nemo.convert.safetensors import DTYPES, ShardWriter, size_bytes
from apertus_nemo.errors import ApertusError, UnfitEnvironment
from apertus_nemo.record.files import file_sha256
from tests.crash.small_disk import small_disk


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "matrix": torch.randn(5, 3, generator=generator).to(dtype),
        "vector": torch.tensor([float("nan"), -0.0, float("inf"), 1e-40]).to(dtype),
        "scalar": torch.tensor(0.5, dtype=dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    held = tensors(dtype)
    entries = {name: (DTYPES[dtype], tuple(tensor.shape)) for name, tensor in held.items()}
    path = tmp_path / "model.safetensors"
    with ShardWriter(path, entries) as shard:
        shard.write("matrix", held["matrix"][:2])
        shard.write("matrix", held["matrix"][2:])
        for name in ("vector", "scalar", "empty"):
            shard.write(name, held[name])
    assert shard.sha256 == file_sha256(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.keys()) == sorted(held)
        for name, tensor in held.items():
            read = file.get_tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            mine, its = (each.reshape(-1).view(torch.uint8) for each in (tensor, read))
            assert torch.equal(mine, its), "to the bit, NaN and -0.0 included"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_complete_or_absent(tmp_path: Path) -> None:
    entries = {"a": ("F32", (2, 2)), "b": ("F32", (1,))}
    with pytest.raises(ApertusError, match="b was not written whole"), ShardWriter(tmp_path / "x", entries) as shard:
        shard.write("a", torch.zeros(2, 2))
    assert not (tmp_path / "x").exists()
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "y", entries):
        raise ZeroDivisionError
    assert not (tmp_path / "y").exists()
    assert not (tmp_path / ".y.partial").exists()


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    entries = {"a": ("F32", (2**16,))}
    with small_disk(tmp_path / "disk", size_bytes=2**18) as disk:
        path = disk.folder / "x"
        full = (
            f"could not write {disk.folder}/.x.partial: the disk is full; free some space, then run the command again"
        )
        (disk.folder / "room").write_bytes(bytes(2**16))  # so that the header has a place, and the tensor has none
        with pytest.raises(UnfitEnvironment) as caught, ShardWriter(path, entries) as shard:
            shard.write("a", torch.zeros(2**16))
        assert str(caught.value) == full
        assert [each.name for each in disk.folder.iterdir()] == ["room"]
        disk.fill()
        with pytest.raises(UnfitEnvironment) as caught:
            ShardWriter(path, entries)
        assert str(caught.value) == full
        assert sorted(each.name for each in disk.folder.iterdir()) == ["ballast", "room"]


def test_order_and_size_are_held(tmp_path: Path) -> None:
    entries = {"a": ("F32", (2, 2)), "b": ("F32", (1,))}
    with pytest.raises(ApertusError, match="b came too early"), ShardWriter(tmp_path / "x", entries) as shard:
        shard.write("b", torch.zeros(1))
    with pytest.raises(ApertusError, match="a has too many bytes"), ShardWriter(tmp_path / "x", entries) as shard:
        shard.write("a", torch.zeros(3, 2))


def test_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UnfitEnvironment, match="could not write"):
        ShardWriter(tmp_path / "no" / "x", {"a": ("F32", (1,))})


def test_sizes() -> None:
    assert size_bytes(("BF16", (131072, 8192))) == 2 * 131072 * 8192
    assert size_bytes(("F32", ())) == 4
