"""Weights of a torch_dist checkpoint, one parameter at a time, whatever its sharding.

    weights = MegatronWeights(folder / "weights", run.model)
    weights.dtype                                     # torch.bfloat16
    for name, piece in weights.published("lm_head.weight"): ...

A torch_dist checkpoint holds logical tensors, cut into chunks by the ranks that wrote them, and an index
(`.metadata`). Nothing of Megatron is needed to read a chunk: the index names file, offset and length, and what lies
there is one tensor of torch.save. At most one parameter, and one chunk of it, are in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from apertus_nemo.convert.unpickle import check_metadata
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.model.adapter_layout import adapter_pieces, adapter_shapes
from apertus_nemo.model.layout import SCALARS, Piece, Range, pieces, published_shapes
from apertus_nemo.recipe.schema import AdapterConfig, ModelConfig

_PREFIX = "module."  # of a model inside NeMo's; Megatron's own checkpoints have none
_LAYERS = re.compile(r"decoder\.layers\.(?!\d)(?P<inner>.+)")  # all layers of one parameter, stacked
_OPTIMIZER = ("optimizer.", "chained_")


class MegatronWeights:
    """The weights of a torch_dist checkpoint of an Apertus model; its optimizer states are left alone."""

    def __init__(self, folder: Path, model: ModelConfig, *, adapter: AdapterConfig | None = None) -> None:
        """Read the index; with `adapter`, that of a checkpoint which holds adapters alone.

        Raises InputError where it is none, or not of a model of these sizes, with every name.
        """
        if not (folder / ".metadata").is_file():
            raise InputError(f"{folder} holds no .metadata: it is no torch_dist checkpoint")
        check_metadata(folder / ".metadata")
        self._folder, self._model, self._adapter = folder, model, adapter
        index = FileSystemReader(folder).read_metadata()
        self._storage: dict[Any, Any] = index.storage_data
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_OPTIMIZER)
        }
        self._files = {
            (key.fqn, tuple(key.offset)): value for key, value in self._storage.items() if key.offset is not None
        }
        self._places = self._account()
        self.dtype: torch.dtype = next(iter(self._tensors.values())).properties.dtype
        self._last: tuple[str, torch.Tensor] | None = None

    def _account(self) -> dict[str, list[tuple[str, str, int | None, Piece]]]:
        """Published name -> its pieces: Megatron's parameter, key in the index, layer in the stack, block.

        Every tensor of the checkpoint is accounted for, and every published one; else InputError names them all.
        """
        wrong: list[str] = []
        places: dict[str, list[tuple[str, str, int | None, Piece]]] = {}
        types = set()
        for key, entry in sorted(self._tensors.items()):
            name = key.removeprefix(_PREFIX)
            stacked = _LAYERS.fullmatch(name)
            shape = tuple(entry.size)
            types.add(entry.properties.dtype)
            if stacked is not None and shape[:1] != (self._model.num_layers,):
                wrong.append(
                    f"{key} holds {shape[0] if shape else 0} layers, and the model has {self._model.num_layers}"
                )
                continue
            inner = (
                [(name, None)]
                if stacked is None
                else [(f"decoder.layers.{layer}.{stacked['inner']}", layer) for layer in range(self._model.num_layers)]
            )
            for parameter, layer in inner:
                try:
                    blocks = self._pieces(parameter)
                except ApertusError:
                    wrong.append(f"{key} is no tensor of an Apertus model")
                    break
                expected = _shape(blocks)
                held = shape if layer is None else shape[1:]
                if held != expected and not (
                    blocks[0].name.endswith(SCALARS) and len(held) == 1
                ):  # of each rank; rank 0's are taken
                    wrong.append(f"{key} has the shape {shape}, and the model wants {expected} in each layer")
                    break
                for block in blocks:
                    places.setdefault(block.name, []).append((parameter, key, layer, block))
        model, adapter = self._model, self._adapter
        wanted = published_shapes(model) if adapter is None else adapter_shapes(model, adapter)
        wrong += [f"{name} is missing" for name in wanted if name not in places]
        wrong += [
            f"{name} stands there twice" for name, found in places.items() if _covered(found) != _size(found[0][3])
        ]
        if len(types) > 1:
            wrong.append(f"weights have different types: {', '.join(sorted(str(kind) for kind in types))}")
        if wrong:
            raise InputError("\n".join(f"{self._folder}: {line}" for line in wrong))
        return places

    def _pieces(self, parameter: str) -> tuple[Piece, ...]:
        if self._adapter is None:
            return pieces(parameter, self._model, tp_rank=0, tp_size=1)
        return adapter_pieces(parameter, self._model, self._adapter.rank, tp_rank=0, tp_size=1)

    def published(self, name: str, rows: Range | None = None) -> Iterator[torch.Tensor]:
        """The published tensor, or these rows of it, in blocks of whole rows, in order: [rows, columns].

        Of a matrix whose chunks are whole rows, no more than a chunk is in memory, and only what is asked for is read.
        """
        first, last = rows or (0, self._places[name][0][3].shape[0])
        places = sorted(self._places[name], key=lambda place: place[3].rows)
        if len(places[0][3].shape) == 1:
            first, last = 0, 1
        if len(places) == 1 and len(places[0][3].shape) == 2:
            _, key, layer, _ = places[0]
            chunks = self._by_rows(key, layer)
            for offsets, count in chunks:
                start = offsets[-2]
                if start < last and first < start + count:
                    held = self._chunk(key, offsets)
                    matrix = held if layer is None else held[0]
                    yield matrix[max(first - start, 0) : last - start]
            if chunks:
                return
        for parameter, key, layer, block in places:
            start, stop = max(first, block.rows[0]), min(last, block.rows[1])
            if start < stop:
                shift = block.local_rows[0] - block.rows[0]
                whole = self._parameter(parameter, key, layer)
                yield whole[start + shift : stop + shift, slice(*block.local_cols)]

    def _by_rows(self, key: str, layer: int | None) -> list[tuple[tuple[int, ...], int]]:
        """Offsets and rows of a matrix's chunks, in order, where each has whole rows of this layer alone; or none."""
        entry = self._tensors[key]
        found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if layer is None or offsets[0] == layer:
                found.append((offsets, sizes))
        found.sort()
        rows, cols = tuple(entry.size)[-2:]
        end = 0
        for offsets, sizes in found:
            if offsets[-2:] != (end, 0) or sizes[-1] != cols or (layer is not None and sizes[0] != 1):
                return []
            end += sizes[-2]
        return [(offsets, sizes[-2]) for offsets, sizes in found] if end == rows else []

    def _parameter(self, parameter: str, key: str, layer: int | None) -> torch.Tensor:
        """A whole parameter as a matrix; the last one is kept, since three published tensors lie in one."""
        if self._last is None or self._last[0] != parameter:
            self._last = None  # before the next one is read
            tensor = self._read(key, layer)
            self._last = parameter, tensor.reshape(1, -1) if tensor.dim() < 2 else tensor
        return self._last[1]

    def _read(self, key: str, layer: int | None) -> torch.Tensor:
        entry = self._tensors[key]
        size = tuple(entry.size) if layer is None else tuple(entry.size)[1:]
        whole: torch.Tensor | None = None
        filled = 0
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + sizes[0]:
                    continue
                held = self._chunk(key, offsets)[layer - offsets[0]]
                offsets, sizes = offsets[1:], sizes[1:]
            else:
                held = self._chunk(key, offsets)
            filled += held.numel()
            if sizes == size:
                return held if held.is_contiguous() else held.contiguous()
            if whole is None:
                whole = torch.empty(size, dtype=entry.properties.dtype)
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = held
        if whole is None or filled != whole.numel():
            raise InputError(f"{self._folder}: the chunks of {key} do not cover it")
        return whole

    def _chunk(self, key: str, offsets: tuple[int, ...]) -> torch.Tensor:
        """One chunk as it was saved; torch opens it with its allow-list."""
        info = self._files.get((key, offsets))
        if info is None:
            raise InputError(f"{self._folder}: the index names no file for a chunk of {key}")
        path = self._folder / info.relative_path
        if Path(info.relative_path).name != info.relative_path:
            raise InputError(f"{self._folder}: the index names the file {info.relative_path!r}, which is not beside it")
        try:
            with path.open("rb") as stream:
                part = cast(IO[bytes], _create_file_view(stream, info.offset, info.length))
                tensor = torch.load(part, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise InputError(f"{path}: the chunk of {key} at byte {info.offset} cannot be read: {error}") from None
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path}: what lies at byte {info.offset} is no tensor")
        return tensor


def _shape(blocks: tuple[Piece, ...]) -> tuple[int, ...]:
    """Of the local parameter that the blocks make up."""
    if len(blocks[0].shape) == 1:
        return blocks[0].shape
    return max(block.local_rows[1] for block in blocks), max(block.local_cols[1] for block in blocks)


def _size(block: Piece) -> int:
    count = 1
    for size in block.shape:
        count *= size
    return count


def _covered(found: list[tuple[str, str, int | None, Piece]]) -> int:
    return sum((b.rows[1] - b.rows[0]) * (b.cols[1] - b.cols[0]) for *_, b in found)
