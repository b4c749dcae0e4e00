"""Writes the torch_dist form that Megatron-core's `dist_checkpointing` loads, chunk by chunk, without a process group.

    with ChunkFile(folder / "__0_0.distcp") as file:
        file.add(Chunk("module.lm_head.weight", (0, 0), (4096, 8192)), tensor)
    write_index(folder, model, dtype, {"__0_0.distcp": file.chunks})

A file holds chunks one after the other, each as torch.save writes a tensor; `.metadata` says of each logical tensor its
size and type, and of each chunk its offsets and sizes in it, file, and bytes; `common.pt` is what belongs to no tensor.
Written as megatron-core 0.15.3 does (`dist_checkpointing/strategies/torch.py`, `filesystem_async.py`), whose own writer
wants all tensors in memory and a process group. The tests load what is written here with Megatron's own reader.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from apertus_nemo.convert.stream import HashedFile
from apertus_nemo.recipe.schema import ModelConfig
from apertus_nemo.record.files import write_atomic

PREFIX = "module."  # of a model inside NeMo's; Megatron's loader asks for the keys that its caller names
OBJECTS_FILE = "__0_objects.distcp"  # what is no tensor
# Linears of which Megatron keeps an object a layer; empty but for Transformer Engine's FP8.
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_BACKEND = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", '
    '"common_backend_version": 1}'
)
# What megatron-core keeps of how a checkpoint was laid out; of weights alone, its defaults.
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Chunk:
    """A block of a logical tensor."""

    key: str  # in the index
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A chunk, and where it lies in its file."""

    chunk: Chunk
    offset: int  # bytes
    length: int  # bytes


class ChunkFile:
    """One file of chunks, complete or absent."""

    def __init__(self, path: Path) -> None:
        self._file = HashedFile(path)
        self.chunks: list[Stored] = []

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, value, trace)

    @property
    def sha256(self) -> str:
        """Of all that was written so far."""
        return self._file.sha256

    @property
    def size_bytes(self) -> int:
        """Written so far."""
        return self._file.size_bytes

    def add(self, chunk: Chunk, tensor: torch.Tensor) -> None:
        """Append a chunk; the tensor has a storage of its own and the chunk's sizes."""
        start = self.size_bytes
        self._save(tensor)
        self.chunks.append(Stored(chunk, start, self.size_bytes - start))

    def add_objects(self, objects: Sequence[Any]) -> tuple[int, int]:
        """Append what Megatron keeps of a layer beside its tensors; offset and length."""
        start = self.size_bytes
        self._save(list(objects))
        return start, self.size_bytes - start

    def _save(self, value: Any) -> None:
        try:
            torch.save(value, cast(IO[bytes], self._file))
        except Exception:
            if self._file.failed is not None:  # torch's writer says something of its own
                raise self._file.failed from None
            raise


def write_index(
    folder: Path, model: ModelConfig, dtype: torch.dtype, files: Mapping[str, Sequence[Stored]]
) -> dict[str, str]:
    """`.metadata`, `common.pt`, `metadata.json` and the layers' objects, beside the files of chunks.

    The same bytes for the same chunks. File -> SHA-256 of the objects' file. Raises UnfitEnvironment.
    """
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with ChunkFile(folder / OBJECTS_FILE) as objects:
        for name in _STATEFUL:
            for layer in range(model.num_layers):
                key = f"{PREFIX}decoder.layers.{name}._extra_state/shard_{layer}_{model.num_layers}"
                tensors[key] = BytesStorageMetadata()
                places[MetadataIndex(key)] = _StorageInfo(OBJECTS_FILE, *objects.add_objects([None]))
    found: dict[str, list[tuple[Stored, str]]] = {}
    for file, chunks in files.items():
        for stored in chunks:
            found.setdefault(stored.chunk.key, []).append((stored, file))
    properties = TensorProperties(dtype=dtype)
    for key, held in found.items():
        held.sort(key=lambda each: each[0].chunk.offsets)
        ends = [tuple(o + s for o, s in zip(each.chunk.offsets, each.chunk.sizes, strict=True)) for each, _ in held]
        size = torch.Size([max(end[axis] for end in ends) for axis in range(len(ends[0]))])
        pieces = [ChunkStorageMetadata(torch.Size(e.chunk.offsets), torch.Size(e.chunk.sizes)) for e, _ in held]
        tensors[key] = TensorStorageMetadata(properties, size, pieces)
        for stored, file in held:
            index = MetadataIndex(key, stored.chunk.offsets)
            places[index] = _StorageInfo(file, stored.offset, stored.length)
    metadata = Metadata(tensors, None, places, StorageMeta(), "1.0.0")
    write_atomic(folder / ".metadata", pickle.dumps(metadata, protocol=4))
    common = io.BytesIO()
    torch.save({"content_metadata": _CONTENT}, common)
    write_atomic(folder / "common.pt", common.getvalue())
    write_atomic(folder / "metadata.json", _BACKEND.encode())
    return {OBJECTS_FILE: objects.sha256}
