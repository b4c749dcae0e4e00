"""Writes safetensors files as a stream: no tensor is held longer than it takes to write it.

    with ShardWriter(path, {"lm_head.weight": ("BF16", (131072, 8192))}) as shard:
        shard.write("lm_head.weight", rows)           # in the order of the header, in as many blocks as come

The library's own `save_file` wants all tensors of a file in memory, and copies them. The format
(https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header, the tensors' bytes
without a gap, little-endian, row by row. What is written is read back with the library in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from apertus_nemo.convert.stream import HashedFile
from apertus_nemo.errors import ApertusError

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
    """One file, complete or absent: it gets its name when every tensor is whole."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self._path = path
        self._left = {name: size_bytes(entry) for name, entry in entries.items()}
        self._order = list(entries)
        self._file = HashedFile(path)
        try:
            self._file.write(header(entries))
        except BaseException:
            self._file.drop()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        short = [name for name, left in self._left.items() if left]
        if kind is None and short:
            self._file.drop()
            raise ApertusError(f"{self._path}: {short[0]} was not written whole")
        self._file.__exit__(kind, value, trace)

    @property
    def sha256(self) -> str:
        """Of all that was written so far."""
        return self._file.sha256

    def write(self, name: str, block: torch.Tensor) -> None:
        """The next rows of a tensor; tensors come in the order of the header."""
        if any(self._left[before] for before in self._order[: self._order.index(name)]):
            raise ApertusError(f"{self._path}: {name} came too early")
        data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
        if len(data) > self._left[name]:
            raise ApertusError(f"{self._path}: {name} has too many bytes")
        self._left[name] -= len(data)
        self._file.write(data)
