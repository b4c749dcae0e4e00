"""The digest of a published folder's weights: the one that a run logged of the step that they are from.

    digests = folder_digests(Path("out"))             # TensorDigest of every weight, sorted
    digest_of(digests)                                # StateDigest.digest_of_kind("weight") of the run's state

One tensor at a time, in blocks of rows. xIELU's constants are checked by value, and are no part of the digest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from apertus_nemo.convert.export import INDEX
from apertus_nemo.convert.lanes import added, block_lanes
from apertus_nemo.convert.megatron import MegatronWeights
from apertus_nemo.convert.safetensors import DTYPES
from apertus_nemo.errors import Differs, InputError
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.recipe.schema import ModelConfig
from apertus_nemo.record.state import Lanes, TensorDigest

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BLOCK_BYTES = 1 << 26


def folder_digests(
    folder: Path, model: ModelConfig, *, progress: Callable[[str], None] = lambda name: None
) -> list[TensorDigest]:
    """Every weight of the folder, which must hold each published tensor once and nothing else.

    Raises InputError (no such folder, a file that is no safetensors), Differs (a tensor missing, too much, of another
    shape; a constant of xIELU with another value), with all names.
    """
    shapes, found, wrong = published_shapes(model), {}, []
    for name, file in tensor_files(folder).items():
        with _opened(file) as tensors:
            part = tensors.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            if name.endswith(("act_fn.beta", "act_fn.eps")):
                value = float(tensors.get_tensor(name))
                want = model.xielu_beta if name.endswith("beta") else model.xielu_eps
                if abs(value - want) > abs(want) * 2**-8:  # as near as bf16 can be
                    wrong.append(f"{name} is {value!r}, and the model's is {want!r}")
                continue
            if shapes.get(name) != shape:
                wrong.append(f"{name} has the shape {shape}" if name in shapes else f"{name} is no tensor of Apertus")
                continue
            found[name] = TensorDigest(name, "weight", _NAMES[dtype], shape, _lanes(part, shape))
            progress(name)
    wrong += [f"{name} is missing" for name in shapes if name not in found and not any(name in w for w in wrong)]
    if wrong:
        raise Differs("\n".join(f"{folder}: {line}" for line in wrong))
    return sorted(found.values())


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it. Raises InputError where the folder's index and files do not agree."""
    single = folder / "model.safetensors"
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_bytes())["weight_map"]
            files = {str(name): folder / str(file) for name, file in places.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise InputError(f"{folder / INDEX} is no index of safetensors") from None
        if any(file.parent != folder for file in files.values()):
            raise InputError(f"{folder / INDEX} names a file that is not beside it")
    elif single.is_file():
        with _opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    else:
        raise InputError(f"{folder} holds neither model.safetensors nor {INDEX}")
    held: dict[Path, set[str]] = {}
    for file in sorted(set(files.values())):
        with _opened(file) as tensors:
            held[file] = set(tensors.keys())
    for name, file in files.items():
        if name not in held[file]:
            raise InputError(f"{folder / INDEX} names {name} in {file.name}, which does not hold it")
    beside = {name for names in held.values() for name in names} - set(files)
    if beside:
        raise InputError(f"{folder / INDEX} does not name {sorted(beside)[0]}, which a file holds")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise InputError(f"{path} is no whole safetensors file: {error}") from None
    except OSError as error:
        raise InputError(f"could not read {path}: {error.strerror or error}") from None


def _lanes(part: Any, shape: tuple[int, ...]) -> Lanes:
    """Sum of all blocks of rows."""
    rows, cols = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
    step = max(1, _BLOCK_BYTES // max(1, cols * 4))
    total: Lanes = (0, 0, 0, 0)
    for start in range(0, rows, step):
        block = part[:].reshape(1, -1) if len(shape) == 1 else part[start : min(start + step, rows)]
        total = added(total, block_lanes(block, row0=start))
    return total


def checkpoint_digests(folder: Path, model: ModelConfig) -> list[TensorDigest]:
    """As `folder_digests`, of a folder that `convert import` made, from Megatron's files; InputError for any other."""
    held = MegatronWeights(folder / "weights", model)
    kind = _NAMES[DTYPES[held.dtype]]
    digests = []
    for name, shape in published_shapes(model).items():
        total: Lanes = (0, 0, 0, 0)
        row = 0
        for block in held.published(name):
            total = added(total, block_lanes(block, row0=row))
            row += block.shape[0]
        digests.append(TensorDigest(name, "weight", kind, shape, total))
    return sorted(digests)
