"""Writes safetensors files as a stream: no tensor is held longer than it takes to write it.

    with ShardWriter(path, {"lm_head.weight": ("BF16", (131072, 8192))}) as shard:
        shard.write("lm_head.weight", rows)           # in the order of the header, in as many blocks as come

The library's own `save_file` wants all tensors of a file in memory, and copies them. The format
(https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header, the tensors' bytes
without a gap, little-endian, row by row. What is written is read back with the library in the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from apertus_nemo.errors import ApertusError
from apertus_nemo.record.files import sync_folder, writing

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_ALIGNMENT = 8  # the header is padded with blanks to this

Entry = tuple[str, tuple[int, ...]]  # type as in DTYPES, shape


def size_bytes(entry: Entry) -> int:
    """Bytes of a tensor."""
    count = ELEMENT_BYTES[entry[0]]
    for size in entry[1]:
        count *= size
    return count


def header(entries: Mapping[str, Entry]) -> bytes:
    """Length and header of a file with these tensors, in this order."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + size_bytes((dtype, shape))
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """One file, complete or absent: written beside its place, and renamed when every tensor is whole."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._left = {name: size_bytes(entry) for name, entry in entries.items()}
        self._order = list(entries)
        self._hash = hashlib.sha256()
        with writing(self._partial):
            self._stream = self._partial.open("wb", buffering=0)
        try:
            self._put(header(entries))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stream.close()
            self._partial.unlink(missing_ok=True)
            return
        short = [name for name, left in self._left.items() if left]
        if short:
            raise ApertusError(f"{self._path}: {short[0]} was not written whole")
        with writing(self._path):
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._partial.rename(self._path)
            sync_folder(self._path.parent)

    @property
    def sha256(self) -> str:
        """Of all that was written so far."""
        return self._hash.hexdigest()

    def write(self, name: str, block: torch.Tensor) -> None:
        """The next rows of a tensor; tensors come in the order of the header."""
        if any(self._left[before] for before in self._order[: self._order.index(name)]):
            raise ApertusError(f"{self._path}: {name} came too early")
        data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
        if len(data) > self._left[name]:
            raise ApertusError(f"{self._path}: {name} has too many bytes")
        self._left[name] -= len(data)
        self._put(data)

    def _put(self, data: bytes | memoryview) -> None:
        with writing(self._partial):
            view = memoryview(data)
            while view:
                part = view[: 1 << 24]
                self._hash.update(part)
                while part:
                    count = self._stream.write(part)
                    part, view = part[count:], view[count:]
