"""Pickles that would call something, where a checkpoint's metadata should be."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def refused(rank: int, world_size: int, *, folder: str) -> dict[str, str]:
    """What `check_metadata` says about each; "taken" where it takes one. None of them may make a file in `folder`."""
    import torch

    from apertus_nemo.convert.unpickle import check_metadata
    from apertus_nemo.errors import InputError

    made = str(Path(folder) / "made")
    pickles = {
        "system": pickle.dumps(_Call(os.system, f"touch {made}")),
        "eval": pickle.dumps({"a": [_Call(eval, f"open({made!r}, 'w')")]}),
        "nested name": b"\x80\x04\x8c\x05torch\x8c\x0bserializatio\x94\x93.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x0eos.system_name\x93.",
        "torch.load": pickle.dumps(_Call(torch.load, made)),
        "cut": pickle.dumps({"a": 1})[:-3],
        "empty": b"",
        "dtypes": pickle.dumps([torch.bfloat16, torch.Size([2, 3])]),
    }
    answers = {}
    for name, data in pickles.items():
        path = Path(folder) / "metadata"
        path.write_bytes(data)
        try:
            check_metadata(path)
            answers[name] = "taken"
        except InputError as error:
            answers[name] = str(error).removeprefix(str(path))
    answers["made"] = str(Path(made).exists())
    return answers


def load_forced(rank: int, world_size: int, *, folder: str) -> list[str]:
    """What a pickle that is no tensor gives with and without `forced`, when the caller asks for all of pickle."""
    import torch

    from apertus_nemo.convert.unpickle import forced

    path = Path(folder) / "object.pt"
    torch.save(_Call(os.getenv, "HOME"), path)
    with forced():
        try:
            torch.load(path, weights_only=False)
            inside = "called"
        except pickle.UnpicklingError:
            inside = "refused"
    torch.load(path, weights_only=False)
    return [inside, str(os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"))]
