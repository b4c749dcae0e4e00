"""Rows of the tensors of a published folder, with plain reads: the pages of a mapped file would count as our memory.

with Rows(Path("hf"), ["model.safetensors"]) as tensors:
    tensors.read("lm_head.weight", 0, 4096, into=block)
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from apertus_nemo.convert.headers import data_start, read_header
from apertus_nemo.errors import InputError
from apertus_nemo.record.files import reading


class Rows:
    """The tensors of a few safetensors files, whose headers were checked; any number of threads may read."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        """Open them. Raises InputError where one cannot be read, or is not whole."""
        self.dtypes: dict[str, str] = {}  # as the format names them: "F32", "BF16"
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, int] = {}
        try:
            for file in files:
                path = folder / file
                header, start = read_header(path), data_start(path)
                with reading(path):
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                for name, entry in header.items():
                    self.dtypes[name], self.shapes[name] = str(entry["dtype"]), tuple(entry["shape"])
                    self._places[name] = (path, start + int(entry["data_offsets"][0]))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, name: str, start: int, stop: int, *, into: torch.Tensor) -> None:
        """Rows `start` to `stop` - 1 into a contiguous tensor of their size and type; a 1-D tensor is one row."""
        path, offset = self._places[name]
        shape = self.shapes[name]
        count = shape[-1] if shape else 1
        view = memoryview(into.reshape(-1).view(torch.uint8).numpy().data)
        assert len(view) == (stop - start) * count * into.element_size()
        offset += start * count * into.element_size()
        with reading(path):
            while view:
                done = os.preadv(self._open[path], [view[: 2**30]], offset)
                if not done:
                    raise InputError(f"{path} has become shorter while it was read")
                view, offset = view[done:], offset + done
