"""Folders of adapters that cannot be merged: each with its reason, one line a fault; and what is merged, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apertus_nemo.convert.merge import merge
from apertus_nemo.convert.peft_form import CONFIG, WEIGHTS, PeftAdapters
from apertus_nemo.errors import Differs, InputError
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.hf_config import to_hf
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.initial import EXPORTED

MODEL = compose("tiny_pretrain").config.model
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "bias": "none"}
LAYER = "base_model.model.model.layers.{}."


def tensors() -> dict[str, torch.Tensor]:
    """Of PEFT's own making: query alone of the attention, which no run of ours has."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(4):
        for module, height in (("self_attn.q_proj", 128), ("mlp.up_proj", 672)):
            name = LAYER.format(layer) + module
            found[f"{name}.lora_A.weight"] = torch.randn(4, 128, generator=generator)
            found[f"{name}.lora_B.weight"] = torch.randn(height, 4, generator=generator)
    return found


def write(folder: Path, config: dict[str, Any] | None = None, held: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **(config or {})}))
    save_file(tensors() if held is None else held, folder / WEIGHTS)
    return folder


def base(folder: Path, dtype: torch.dtype) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    held = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in published_shapes(MODEL).items()}
    save_file(held, folder / "model.safetensors")
    tokens: dict[str, int | None] = {"bos": 1, "eos": 2, "pad": 3}
    (folder / "config.json").write_text(json.dumps(to_hf(MODEL, dtype=str(dtype), tokens=tokens)))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is True, and only False can be merged"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, and only {} can be merged"),
        ({"bias": "all"}, "bias is 'all', and only 'none' can be merged"),
        ({"r": 0}, "r is 0, and an adapter has a rank of at least 1"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', and a positive number is wanted"),
        ({"target_modules": "all-linear"}, "target_modules is no list of names"),
        ({"target_modules": ["q_proj", "up_proj", "gate_proj"]}, "names gate_proj, which has no adapter in Apertus"),
    ],
)
def test_configurations(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        PeftAdapters(write(tmp_path / "adapter", config), MODEL)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(LAYER.format(3) + "mlp.up_proj.lora_A.weight"), "up_proj.lora_A.weight is missing"),
        (
            lambda held: held.update({LAYER.format(0) + "mlp.down_proj.lora_A.weight": torch.ones(4, 672)}),
            "down_proj.lora_A.weight is no tensor of these adapters",
        ),
        (
            lambda held: held.update({LAYER.format(0) + "mlp.up_proj.lora_B.weight": torch.ones(672, 5)}),
            "up_proj.lora_B.weight has the shape (672, 5), and (672, 4) is wanted",
        ),
        (
            lambda held: held[LAYER.format(1) + "mlp.up_proj.lora_B.weight"].fill_(float("nan")),
            "up_proj.lora_B.weight is of the type torch.float32, or holds a value that is not finite",
        ),
    ],
)
def test_tensors(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    held = tensors()
    change(held)
    with pytest.raises(InputError) as error:
        PeftAdapters(write(tmp_path / "adapter", held=held), MODEL)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is no whole safetensors file"):
        PeftAdapters(folder, MODEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_by_hand(tmp_path: Path, dtype: torch.dtype) -> None:
    """W + 2 B A in float64, rounded; all other tensors as they were; twice the same bytes; the base is not known."""
    hf, adapter = base(tmp_path / "hf", dtype), write(tmp_path / "adapter")
    done = merge(hf, adapter, tmp_path / "merged", like=MODEL)
    assert done.base is None
    before, after, held = (
        load_file(hf / "model.safetensors"),
        load_file(tmp_path / "merged" / "model.safetensors"),
        tensors(),
    )
    for name, weight in before.items():
        a = held.get("base_model.model." + name.removesuffix("weight") + "lora_A.weight")
        if a is None:
            assert torch.equal(after[name], weight), name
            continue
        b = held["base_model.model." + name.removesuffix("weight") + "lora_B.weight"]
        exact = weight.double() + 2.0 * (b.double() @ a.double())
        assert after[name].dtype == dtype
        assert torch.allclose(
            after[name].double(), exact, rtol=2.0**-23 if dtype == torch.float32 else 2.0**-7, atol=1e-12
        )
    again = merge(hf, adapter, tmp_path / "again", like=MODEL)
    assert again.weights_digest == done.weights_digest
    files = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert files == ["apertus-nemo.json", "config.json", "model.safetensors"]
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes() for name in files)
    with pytest.raises(InputError, match="is there already: name a folder that is not"):
        merge(hf, adapter, tmp_path / "again", like=MODEL)


def test_another_base(tmp_path: Path) -> None:
    hf, adapter = base(tmp_path / "hf", torch.float32), write(tmp_path / "adapter")
    (adapter / EXPORTED).write_bytes(dumps({"base": {"files": None, "weights_digests": ["0" * 64]}, "source": None}))
    with pytest.raises(Differs) as error:
        merge(hf, adapter, tmp_path / "merged", like=MODEL)
    assert f"and {'0' * 64} is wanted" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "hf"]
