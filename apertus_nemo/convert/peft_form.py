"""Adapters as Hugging Face's `peft` keeps them: adapter_model.safetensors and adapter_config.json.

    export_adapters(checkpoint / "weights", run, Path("adapter"), note={...})
    adapters = PeftAdapters(Path("adapter"), model)
    adapters.scale, adapters.matrices("model.layers.0.self_attn.q_proj.weight")     # (A, B) or None

PEFT names a matrix `base_model.model.<module>.lora_A.weight`, [rank, in], or `lora_B`, [out, rank]. A run's query, key
and value share one A (`model/adapter_layout.py`): it is written for each of the three, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from apertus_nemo.convert.lanes import finite
from apertus_nemo.convert.megatron import MegatronWeights
from apertus_nemo.convert.safetensors import DTYPES, Entry, ShardWriter
from apertus_nemo.errors import InputError
from apertus_nemo.model.adapter_layout import PUBLISHED, adapter_shapes, shared_a
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.recipe.schema import ModelConfig, RunConfig
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.files import reading, sync_folder, write_atomic, writing
from apertus_nemo.record.initial import EXPORTED, read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(model\.layers\.\d+\.(\w+\.\w+))\.lora_([AB])\.weight")
# What would make another function of the same matrices; with these values, PEFT adds lora_alpha / r B A x.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}
_LISTED = 20


def export_adapters(weights: Path, run: RunConfig, folder: Path, *, note: dict[str, Any]) -> int:
    """Write `folder` from a checkpoint's torch_dist files, whole or absent; the number of matrices.

    `note` says where they are from, and is kept in the folder. Raises InputError (a checkpoint that is not of this
    model and these adapters, a value that is not finite, a folder that is there), UnfitEnvironment (disk).
    """
    found = MegatronWeights(weights, run.model, adapter=run.adapter)
    if os.path.lexists(folder):
        raise InputError(f"{folder} is there already: name a folder that is not")
    names = _names(run)
    shapes = adapter_shapes(run.model, run.adapter)
    held: dict[str, Entry] = {theirs: (DTYPES[found.dtype], shapes[ours]) for theirs, ours in names.items()}
    place = folder.with_name(f".{folder.name}.partial")
    with writing(place):
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(parents=True)
    try:
        with ShardWriter(place / WEIGHTS, held) as file:
            for theirs, ours in names.items():
                for block in found.published(ours):
                    if not finite(block):
                        raise InputError(f"{ours} holds a value that is not finite")
                    file.write(theirs, block)
    except InputError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    write_atomic(place / CONFIG, (json.dumps(_config(run), indent=2, sort_keys=True) + "\n").encode())
    write_atomic(place / EXPORTED, dumps(note))
    with writing(folder):
        sync_folder(place)
        place.rename(folder)
        sync_folder(folder.parent)
    return len(held)


def _names(run: RunConfig) -> dict[str, str]:
    """PEFT's name -> ours, in the order of the computation."""
    names = {}
    for layer in range(run.model.num_layers):
        for target in PUBLISHED:
            for short in PUBLISHED[target] if target in run.adapter.targets else ():
                module = f"model.layers.{layer}.{short}"
                names[f"{_PREFIX}{module}.lora_A.weight"] = shared_a(module)
                names[f"{_PREFIX}{module}.lora_B.weight"] = f"{module}.lora_B.weight"
    return names


def _config(run: RunConfig) -> dict[str, Any]:
    adapter = run.adapter
    modules = [module.split(".")[1] for target in adapter.targets for module in PUBLISHED[target]]
    return {
        **_PLAIN,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "r": adapter.rank,
        "revision": None,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }


class PeftAdapters:
    """The adapters of a folder in PEFT's form, on a model of these sizes; all in memory, as they are small."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Raises InputError where the folder is not one, or holds what is not LoRA's plain form, with every name."""
        config = read_json(folder / CONFIG)
        for name, plain in _PLAIN.items():
            if config.get(name, plain) not in (plain, *([] if plain else [None, [], {}])):
                raise InputError(f"{folder / CONFIG}: {name} is {config[name]!r}, and only {plain!r} can be merged")
        rank, alpha, modules = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
        if type(rank) is not int or rank < 1:
            raise InputError(f"{folder / CONFIG}: r is {rank!r}, and an adapter has a rank of at least 1")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e9:
            raise InputError(f"{folder / CONFIG}: lora_alpha is {alpha!r}, and a positive number is wanted")
        if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
            raise InputError(f"{folder / CONFIG}: target_modules is no list of names")
        self.rank, self.modules, self.scale = rank, modules, float(alpha) / rank
        try:
            with reading(folder / WEIGHTS):
                tensors = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS} is no whole safetensors file: {error}") from None
        self._tensors = self._checked(folder, tensors, model)

    def _checked(self, folder: Path, tensors: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
        shapes, rank = published_shapes(model), self.rank
        known = {short for target in PUBLISHED for short in PUBLISHED[target]}
        chosen = {short for short in known if short.split(".")[1] in self.modules}
        wrong = [f"{CONFIG} names {name}, which has no adapter in Apertus" for name in self.modules if not any(
            short.endswith(f".{name}") for short in known)]  # fmt: skip
        wanted = {}
        for layer in range(model.num_layers):
            for short in sorted(chosen):
                module = f"model.layers.{layer}.{short}"
                height, width = shapes[f"{module}.weight"]
                wanted[f"{_PREFIX}{module}.lora_A.weight"] = (rank, width)
                wanted[f"{_PREFIX}{module}.lora_B.weight"] = (height, rank)
        for name, tensor in sorted(tensors.items()):
            if name not in wanted:
                wrong.append(f"{name} is no tensor of these adapters")
            elif tuple(tensor.shape) != wanted[name]:
                wrong.append(f"{name} has the shape {tuple(tensor.shape)}, and {wanted[name]} is wanted")
            elif tensor.dtype not in DTYPES or not finite(tensor):
                wrong.append(f"{name} is of the type {tensor.dtype}, or holds a value that is not finite")
        wrong += [f"{name} is missing" for name in wanted if name not in tensors]
        if wrong:
            more = [f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
            raise InputError("\n".join(f"{folder}: {line}" for line in [*wrong[:_LISTED], *more]))
        return tensors

    def matrices(self, weight: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(A, B) of a published weight; None where it has no adapter."""
        module = _PREFIX + weight.removesuffix(".weight")
        a = self._tensors.get(f"{module}.lora_A.weight")
        return None if a is None else (a, self._tensors[f"{module}.lora_B.weight"])
