"""What a checkpoint may make Python call when it is read: the few names that torch's and Megatron's writers use.

Three kinds of pickles lie in a checkpoint. torch opens `common.pt` and the tensors' files with an allow-list of its
own (`weights_only`); `forced` has it do the same for the objects among them. It opens `.metadata` without any:
`check_metadata` reads that file first, and refuses every other name before it is called.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apertus_nemo.errors import InputError
from apertus_nemo.record.files import read_bytes

_MAX_BYTES = 2**30
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("torch.distributed.checkpoint.planner", "TensorWriteData"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
        ("torch.serialization", "_get_layout"),
    }
)


class _Refused(Exception):
    """A name that no checkpoint needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what is allowed, and torch's types of numbers."""
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        kind = vars(torch).get(name) if module == "torch" else None
        if isinstance(kind, torch.dtype):
            return kind
        raise _Refused(f"{module}.{name}")


def check_metadata(path: Path) -> None:
    """Raise InputError where the pickle is damaged, or names anything but ALLOWED; nothing else is called."""
    data = read_bytes(path, max_bytes=_MAX_BYTES)
    try:
        _Unpickler(io.BytesIO(data)).load()
    except _Refused as error:
        raise InputError(f"{path} names {error}, which no checkpoint needs: it is not opened") from None
    except Exception as error:
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


@contextmanager
def forced() -> Iterator[None]:
    """Inside, every `torch.load` has its allow-list, whatever the caller says."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
