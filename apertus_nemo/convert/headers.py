"""Which tensors a folder of safetensors holds, from the headers alone, without torch: refused before anything is read.

    refuse_other_tensors(Path("hf"), published_shapes(model))

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header, and
the tensors' bytes without a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.files import reading

ELEMENT_BYTES = {"F32": 4, "BF16": 2}
CONSTANTS = ("act_fn.beta", "act_fn.eps")  # of xIELU, kept beside the weights by transformers; no weights
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_LISTED = 20


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor -> {"dtype", "shape", "data_offsets"}; raises InputError where the file is not whole."""
    with reading(path), path.open("rb") as stream:
        size = path.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{path} is no safetensors file, or is truncated in its header")
        text = stream.read(length)
    try:
        tree = json.loads(text)
        tree.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in tree.values()]
        shapes = [tuple(map(int, entry["shape"])) for entry in tree.values()]
        types = [str(entry["dtype"]) for entry in tree.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise InputError(f"{path} is no safetensors file: its header cannot be read") from None
    assert len(ends) == len(shapes) == len(types)
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise InputError(f"{path} is not whole: it has {size} bytes, and its header says {expected}")
    return dict(tree)


def data_start(path: Path) -> int:
    """The byte where the tensors begin, which `data_offsets` count from; of a file that `read_header` has read."""
    with reading(path), path.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def refuse_other_tensors(folder: Path, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The files `names` of the folder hold each tensor of `shapes` once, and xIELU's constants, and nothing else.

    Raises InputError with every tensor that is missing, too much, or of another shape or type.
    """
    found: dict[str, str] = {}
    wrong = []
    for file in names:
        for name, entry in sorted(read_header(folder / file).items()):
            if name in found:
                wrong.append(f"{name} is in {found[name]} and in {file}")
                continue
            found[name] = file
            if name.endswith(CONSTANTS):
                continue
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            if name not in shapes:
                wrong.append(f"{name} is no tensor of this model")
            elif shape != shapes[name]:
                wrong.append(f"{name} has the shape {_text(shape)}, and the model's is {_text(shapes[name])}")
            elif dtype not in ELEMENT_BYTES:
                wrong.append(f"{name} is of the type {dtype}; {' and '.join(ELEMENT_BYTES)} can be read")
            elif entry["data_offsets"][1] - entry["data_offsets"][0] != math.prod(shape) * ELEMENT_BYTES[dtype]:
                wrong.append(f"{name} has not the bytes of its shape")
    wrong += [f"{name} is missing" for name in shapes if name not in found]
    if wrong:
        more = [f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
        lines = [f"{folder}: {line}" for line in [*wrong[:_LISTED], *more]]
        raise InputError("\n".join(line if line.isprintable() else ascii(line)[1:-1] for line in lines))


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
