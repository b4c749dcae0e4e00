"""config.json against transformers' own class, and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.hf_config import from_hf, to_hf
from apertus_nemo.recipe.schema import ModelConfig


def model(name: str) -> ModelConfig:
    recipe = compose(overrides=[f"model={name}"])
    return recipe.config.model


@pytest.mark.parametrize("name", ["tiny", "apertus_8b", "apertus_70b"])
def test_and_back(name: str) -> None:
    config = model(name)
    tree = json.loads(json.dumps(to_hf(config, dtype="torch.bfloat16", tokens={"bos": 1, "eos": 2, "pad": 3})))
    other = dataclasses.replace(config, num_layers=1, hidden_size=8, rotary_base=1.0, rope_scaling_factor=3.0)
    assert from_hf(tree, other, what="it") == config


def test_transformers_reads_it() -> None:
    from transformers import ApertusConfig

    config = model("apertus_8b")
    read = ApertusConfig(**to_hf(config, dtype="torch.bfloat16", tokens={"bos": 1, "eos": 2, "pad": 3}))
    assert (read.num_hidden_layers, read.intermediate_size, read.num_key_value_heads) == (32, 21504, 8)
    assert (read.hidden_act, read.rms_norm_eps, read.rope_theta) == ("xielu", 1e-5, 500_000.0)
    assert read.rope_scaling["rope_type"] == "llama3"
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "it: model_type is 'llama', and only 'apertus' is converted"),
        ({"hidden_act": "silu"}, "it: hidden_act is 'silu', and an Apertus model has 'xielu'"),
        ({"attention_bias": True}, "it: attention_bias is True, and an Apertus model has False"),
        ({"num_hidden_layers": "32"}, "it: num_hidden_layers is '32', and a number is wanted"),
        ({"num_hidden_layers": 1.5}, "it: num_hidden_layers is 1.5, and a number is wanted"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "it: rope_scaling is not of the kind 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "it: rope_scaling: factor is None, and a number is wanted"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    config = model("apertus_8b")
    tree = {**to_hf(config, dtype="torch.float32", tokens={}), **change}
    with pytest.raises(InputError) as error:
        from_hf(tree, config, what="it")
    assert str(error.value) == message


@pytest.mark.parametrize("tree", [None, [], "apertus", 3])
def test_no_object(tree: object) -> None:
    with pytest.raises(InputError, match="it: is no JSON object"):
        from_hf(tree, model("tiny"), what="it")
