"""Checkpoints of every layout, exported: the bits that were logged, and the logits of transformers' own model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.state import StateDigest
from apertus_nemo.testing.ranks import Parent
from tests.integration.runs import LAYOUTS, STEPS, Run


def exported(parent: Parent, run: Run, folder: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """`overrides`: those of the model, where it is not the default recipe's."""
    checkpoint = str(run.directory.checkpoint(STEPS))
    arguments = {"checkpoint": checkpoint, "folder": str(folder), "overrides": list(overrides), **options}
    (answer,) = parent.run("tests.cases.convert:exported", arguments=arguments)
    return dict(answer)


def logged(run: Run) -> str:
    path = run.directory.state(STEPS)
    return StateDigest.from_bytes(path.read_bytes(), what="state").digest_of_kind("weight")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in ("one", "tp2") else [pytest.mark.full]) for name in LAYOUTS]
)
def test_the_bits_that_were_logged(runs: Callable[..., Run], parent: Parent, tmp_path: Path, layout: str) -> None:
    run = runs(layout)
    answer = exported(parent, run, tmp_path / "out", *LAYOUTS[layout][1], shard_bytes=1_000_000)
    assert answer["digest"] == logged(run)
    assert answer["shards"] > 1
    assert not [path.name for path in tmp_path.iterdir() if path.name != "out"]


def test_in_bf16(runs: Callable[..., Run], parent: Parent, tmp_path: Path) -> None:
    run = runs("one", "trainer.precision=bf16")
    answer = exported(parent, run, tmp_path / "out", precision="bf16")
    assert answer["digest"] == logged(run)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_transformers_computes_the_same(runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path) -> None:
    """fp32 to 1e-5, no key missing or too much, and no warning but of the positions that the tiny model announces."""
    arguments = {
        "checkpoint": str(runs("one").directory.checkpoint(STEPS)),
        "folder": str(tmp_path / "out"),
        "tokenizer": str(corpus / "tokenizer"),
    }
    (answer,) = parent.run("tests.cases.convert:logits", arguments=arguments)
    assert answer["keys"] == {"missing": [], "unexpected": [], "mismatched": []}
    assert answer["scalars"] == ["torch.bfloat16"], "docs/convert.md says so; see there"
    assert answer["deviation"] < 1e-5
    assert answer["same_argmax"] == 1.0
    assert answer["warnings"] == []
    assert answer["tokens"] == {"bos": 1, "eos": 2, "pad": 3}
    assert answer["inputs"] == ["attention_mask", "input_ids"], "what ApertusForCausalLM.generate takes"
    assert answer["round_trip"]


def test_transformers_computes_the_same_in_bf16(
    runs: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path
) -> None:
    """torch's own tolerances for bf16, and the same choice, of a model that has learnt: else all logits are near 0."""
    run = runs("one", "trainer.precision=bf16", "optim.lr=3e-3", "optim.min_lr=3e-4")
    arguments = {
        "checkpoint": str(run.directory.checkpoint(STEPS)),
        "folder": str(tmp_path / "out"),
        "tokenizer": str(corpus / "tokenizer"),
        "precision": "bf16",
    }
    (answer,) = parent.run("tests.cases.convert:logits", arguments=arguments)
    assert answer["keys"] == {"missing": [], "unexpected": [], "mismatched": []}
    assert answer["warnings"] == []
    assert answer["same_argmax"] >= 0.99, answer
    assert answer["close"] >= 0.95, answer


def test_every_tensor_is_accounted_for(runs: Callable[..., Run], parent: Parent, tmp_path: Path) -> None:
    run = runs("one")
    arguments = {"checkpoint": str(run.directory.checkpoint(STEPS)), "folder": str(tmp_path)}
    (answer,) = parent.run("tests.cases.convert:refused", arguments=arguments)
    assert "module.decoder.layers.mlp.linear_fc1.weight holds 4 layers, and the model has 5" in answer["deeper"]
    assert "module.output_layer.weight has the shape" in answer["wider"]
    assert "model.layers.0.self_attn.q_norm.weight is missing" in answer["missing"]
    assert "is no tensor of an Apertus model" in answer["foreign"]
    assert "cannot be read" in answer["torn"] or "cover" in answer["torn"]
    assert answer["there"].endswith("is there already: name a folder that is not")
    assert answer["left"] == []


def test_interrupted(runs: Callable[..., Run], parent: Parent, tmp_path: Path) -> None:
    """Killed in the middle, it goes on with the files that are whole, and ends with the same bytes."""
    run = runs("one")
    exported(parent, run, tmp_path / "whole", shard_bytes=500_000)
    arguments = {"checkpoint": str(run.directory.checkpoint(STEPS)), "folder": str(tmp_path / "out")}
    (answer,) = parent.run("tests.cases.convert:interrupted", arguments=arguments)
    assert answer["before"] > 0
    assert answer["kept"] == answer["before"], "files that were whole are not written again"
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(tmp_path / "out")
