"""Fills a model chunk with weights that exist already, at any sharding: each rank reads its own rows and columns.

    fill(chunk, run, weights_in(folder, run), tp_rank=0, tp_size=2, layer_offset=4)

The counterpart of `model/init.py`, which draws them. A weight is copied bit for bit, or widened from bf16 to fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors import safe_open

from apertus_nemo.convert.digest import tensor_files
from apertus_nemo.convert.megatron import MegatronWeights
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.model.layout import Range, pieces, published_shapes
from apertus_nemo.recipe.schema import ModelConfig, RunConfig
from apertus_nemo.record.initial import HUGGING_FACE
from apertus_nemo.record.state import published_name


class Weights(ABC):
    """Published tensors that can be read in blocks."""

    @abstractmethod
    def block(self, name: str, rows: Range, cols: Range) -> torch.Tensor:
        """Rows and columns of a published tensor, seen as a matrix."""


class FolderWeights(Weights):
    """The safetensors of a folder in the published form."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Raises InputError where a published tensor is missing, or one is there that no Apertus model has."""
        self._files = tensor_files(folder)
        wanted = set(published_shapes(model))
        found = {name for name in self._files if not name.endswith(("act_fn.beta", "act_fn.eps"))}
        for name in sorted(wanted ^ found):
            raise InputError(f"{folder}: {name} is {'missing' if name in wanted else 'no tensor of this model'}")

    def block(self, name: str, rows: Range, cols: Range) -> torch.Tensor:
        """As in Weights; only these rows are read."""
        with safe_open(self._files[name], framework="pt") as file:
            part = file.get_slice(name)
            if len(part.get_shape()) == 1:
                return part[slice(*cols)].reshape(1, -1)  # type: ignore[no-any-return]
            return part[slice(*rows), slice(*cols)]  # type: ignore[no-any-return]


class CheckpointWeights(Weights):
    """The weights of a torch_dist checkpoint, as a run writes them or `convert import`."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._weights = MegatronWeights(folder / "weights", model)

    def block(self, name: str, rows: Range, cols: Range) -> torch.Tensor:
        """As in Weights; only chunks that hold some of these rows are read."""
        found = [block[:, slice(*cols)] for block in self._weights.published(name, rows)]
        return found[0] if len(found) == 1 else torch.cat(found)


def weights_in(folder: Path, run: RunConfig) -> Weights:
    """What `run.initial` starts from, in `folder`, which was hashed."""
    return (FolderWeights if run.initial.kind == HUGGING_FACE else CheckpointWeights)(folder, run.model)


def fill(
    chunk: torch.nn.Module, run: RunConfig, weights: Weights, *, tp_rank: int, tp_size: int, layer_offset: int
) -> None:
    """Copy every parameter of a Megatron GPTModel (one model chunk, not wrapped) from published tensors.

    Raises InputError for a tensor of another shape or type, and for a value that is not finite.
    """
    with torch.no_grad():
        for parameter, tensor in chunk.named_parameters():
            matrix = tensor.detach().view(1, -1) if tensor.dim() == 1 else tensor.detach()
            covered = 0
            blocks = pieces(parameter, run.model, tp_rank=tp_rank, tp_size=tp_size, layer_offset=layer_offset)
            for piece in sorted(blocks, key=lambda block: block.name):  # of Q, K and V in turn; each is read once
                values = weights.block(published_name(piece.name), piece.rows, piece.cols)
                local = matrix[slice(*piece.local_rows), slice(*piece.local_cols)]
                if local.shape != values.shape:
                    raise InputError(f"{piece.name} has another shape than this model's {piece.shape}")
                if values.dtype.itemsize > tensor.dtype.itemsize:
                    raise InputError(f"{piece.name} is {values.dtype}, and would be rounded to {tensor.dtype}")
                if not bool(torch.isfinite(values).all()):
                    raise InputError(f"{piece.name} holds a value that is not finite")
                local.copy_(values)
                covered += values.numel()
            if covered != tensor.numel():
                raise ApertusError(f"{parameter} has {tensor.numel()} elements, and {covered} were read")
