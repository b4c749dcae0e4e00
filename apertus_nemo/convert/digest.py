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

import numpy as np
from safetensors import SafetensorError, safe_open

from apertus_nemo.convert.export import INDEX
from apertus_nemo.errors import Differs, InputError
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.recipe.schema import ModelConfig
from apertus_nemo.record.state import LANES, Lanes, TensorDigest
from apertus_nemo.record.state_digest import bits, weights

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
            found[name] = TensorDigest(name, "weight", _NAMES[dtype], shape, _lanes(part, shape, dtype))
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


def _lanes(part: Any, shape: tuple[int, ...], dtype: str) -> Lanes:
    """Sum of all blocks. The weights factor, so a lane is a matrix product: rows' weights x bits x columns' weights."""
    import torch

    rows, cols = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
    step = max(1, _BLOCK_BYTES // max(1, cols * 8))
    columns = [weights(lane, 1, 0, cols) for lane in range(LANES)]
    total = [0] * LANES
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        tensor = part[:] if len(shape) == 1 else part[start:stop]
        words = bits(
            tensor.contiguous()
            .view(torch.int32 if dtype == "F32" else torch.int16)
            .numpy()
            .view(np.uint32 if dtype == "F32" else np.uint16)
        ).astype(np.uint64)
        for lane in range(LANES):
            by_row = words @ columns[lane]
            total[lane] += int((by_row * weights(lane, 0, start, stop)).sum(dtype=np.uint64))
    first, second, third, fourth = (value & (2**64 - 1) for value in total)
    return first, second, third, fourth
