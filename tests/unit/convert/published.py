"""Folders in the published form, of random values."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from apertus_nemo.model.layout import published_shapes
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.hf_config import to_hf
from apertus_nemo.recipe.schema import ModelConfig

SMALL = ("model.num_layers=2", "model.vocab_size=320")


def small_model() -> ModelConfig:
    """The tiny model, smaller."""
    return compose(overrides=list(SMALL)).config.model


def make_published(
    path: Path, dtype: torch.dtype = torch.bfloat16, *, model: ModelConfig | None = None, constants: bool = True
) -> Path:
    """A folder with two files, their index and a config.json, as transformers would write it."""
    model = model or small_model()
    coin = torch.Generator().manual_seed(11)
    tensors = {name: torch.randn(shape, generator=coin).to(dtype) for name, shape in published_shapes(model).items()}
    for layer in range(model.num_layers if constants else 0):
        for name, value in (("beta", model.xielu_beta), ("eps", model.xielu_eps)):
            tensors[f"model.layers.{layer}.mlp.act_fn.{name}"] = torch.tensor(value, dtype=dtype)
    path.mkdir(parents=True)
    names = sorted(tensors)
    files = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, path / file, metadata={"format": "pt"})
    places = {name: file for file, held in files.items() for name in held}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens: dict[str, int | None] = {"bos": 7, "eos": 8, "pad": 9}
    (path / "config.json").write_text(json.dumps(to_hf(model, dtype=str(dtype), tokens=tokens)))
    return path


def bytes_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensor -> type, shape and bytes, as the safetensors library reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                held = tensors.get_tensor(name)
                data = held.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(held.dtype), tuple(held.shape), data)
    return found
