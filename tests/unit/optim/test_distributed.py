"""The optimizer on Megatron's distributed optimizer: the same bits at every sharding, through checkpoints and back."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apertus_nemo.model.init import initial_values
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.optim.schedule import at_step
from apertus_nemo.testing.ranks import Parent
from tests.cases.optim import gradient, small_run

TIMEOUT_S = 100.0
SHARDINGS = {
    "one": {"world": 1},
    "tp2": {"world": 2, "tp": 2},
    "pp2": {"world": 2, "pp": 2},
    "pp2-vpp2": {"world": 2, "pp": 2, "vpp": 2},
    "dp2": {"world": 2},
    "tp2-dp2": {"world": 4, "tp": 2},
}


def train(parent: Parent, sharding: str, **arguments: Any) -> dict[str, Any]:
    world, rest = SHARDINGS[sharding]["world"], {k: v for k, v in SHARDINGS[sharding].items() if k != "world"}
    result = parent.run(
        "tests.cases.optim:train", world_size=world, arguments={**rest, **arguments}, timeout_s=TIMEOUT_S
    )
    answer: dict[str, Any] = result[0]
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one(parent: Parent, folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, three more, on one rank."""
    shapes = published_shapes(small_run(1).model)
    values = [f"weight {name}" for name in shapes]
    return train(parent, "one", after=3, save=str(folder / "one"), values=values)


def test_the_whole_chain_against_float64(one: dict[str, Any]) -> None:
    """Clipping by the global norm, decay by parameter, schedules, batch ramp and update, from nothing but numpy."""
    run = small_run(1)
    shapes = published_shapes(run.model)
    p, states = {}, {}
    for name, shape in shapes.items():
        rows, cols = (0, 1 if len(shape) == 1 else shape[0]), (0, shape[-1])
        p[name] = initial_values(name, shape, rows, cols, seed=run.trainer.seed, model=run.model).astype(np.float64)
        states[name] = [np.zeros_like(p[name]) for _ in range(3)]
    start = {name: value.copy() for name, value in p.items()}
    for step in range(1, 7):
        grads = {name: gradient(name, shape, step).astype(np.float64) for name, shape in shapes.items()}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        s = at_step(run, step)
        logged_norm, logged_lr = one["log"][step - 1]
        assert logged_norm == pytest.approx(norm, rel=1e-12)
        assert norm > 0.1
        assert logged_lr == s.lr
        for name, g in grads.items():
            g = g * min(1.0, 0.1 / (norm + 1e-6))
            m1, m2, v = states[name]
            m1 += 0.1 * (g - m1)
            m2 += (1 - s.beta3) * (g - m2)
            v += 0.001 * (g * g - v)
            update = (m1 / (1 - 0.9**step) + s.alpha * m2) / (np.sqrt(v) / math.sqrt(1 - 0.999**step) + 1e-8)
            p[name] -= s.lr * (update + (0.1 if len(shapes[name]) == 2 else 0.0) * p[name])
    # consumed before each step: 0, 4 of 8 for the warm-up, 8 (the batch doubles), 16, 24, 32; decay from 28 to 56
    last = 1e-3 + (1 - math.sqrt(4 / 28)) * 9e-3
    assert [lr for _, lr in one["log"]] == pytest.approx([0.0, 0.005, 0.01, 0.01, 0.01, last], rel=1e-15)
    for name in shapes:
        ours = np.asarray(one["values"][f"weight {name}"])
        assert np.abs(p[name] - start[name]).max() > 1e-4, name
        assert np.abs(ours - p[name]).max() < 2e-6, name


@pytest.mark.parametrize("sharding", ["tp2", "pp2", "pp2-vpp2", "dp2", "tp2-dp2"])
def test_every_sharding_gives_the_same_bits(parent: Parent, folder: Path, one: dict[str, Any], sharding: str) -> None:
    """From the start, and from the checkpoint of one rank; each leaves a checkpoint for the next test."""
    fresh = train(parent, sharding, save=str(folder / sharding), after=3)
    assert fresh["middle"] == one["middle"]
    assert fresh["end"] == one["end"]
    for ours, theirs in zip(fresh["log"], one["log"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-14)
    resumed = train(parent, sharding, load=str(folder / "one"), after=3)
    assert resumed["middle"] == one["middle"]
    assert resumed["end"] == one["end"]
    assert resumed["step"] == 6


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("one", "one"),
        ("dp2", "dp2"),
        ("dp2", "tp2"),
        ("tp2", "pp2"),
        ("pp2", "dp2"),
        ("pp2-vpp2", "tp2"),
        ("tp2", "pp2-vpp2"),
        ("tp2-dp2", "one"),
        ("tp2", "tp2-dp2"),
    ],
)
def test_a_checkpoint_is_whole_under_any_sharding(
    parent: Parent, folder: Path, one: dict[str, Any], saved: str, loaded: str
) -> None:
    """Every weight and state bit-equal by name, none as before loading; training goes on as if uncut."""
    if not (folder / saved).exists():
        train(parent, saved, save=str(folder / saved))
    result = train(parent, loaded, load=str(folder / saved), after=3)
    states = {key.split(" ")[0] for key in result["middle"]}
    assert states == {"weight", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq"}
    assert len(result["middle"]) == 4 * len(published_shapes(small_run(1).model))
    assert result["middle"] == one["middle"]
    assert result["end"] == one["end"]


def test_main_parameters_of_a_bfloat16_model(parent: Parent, tmp_path: Path) -> None:
    """The float32 values travel too; bfloat16 weights alone would lose 16 bits of each."""
    saved = train(parent, "dp2", precision="bf16", after=3, save=str(tmp_path / "bf16"))
    assert {key.split(" ")[0] for key in saved["middle"]} == {
        "weight",
        "master",
        "exp_avg_fast",
        "exp_avg_slow",
        "exp_avg_sq",
    }
    name = "model.layers.0.mlp.up_proj.weight"
    assert saved["middle"][f"master {name}"] != saved["middle"][f"weight {name}"]
    for sharding in ("one", "tp2"):
        loaded = train(parent, sharding, precision="bf16", load=str(tmp_path / "bf16"), after=3)
        assert loaded["middle"] == saved["middle"]
        assert loaded["end"] == saved["end"]


def test_the_layout_by_buckets_survives_a_change_of_data_parallel_size(
    parent: Parent, tmp_path: Path, one: dict[str, Any]
) -> None:
    train(parent, "dp2", save=str(tmp_path / "buckets"), layout="dp_reshardable")
    for sharding in ("dp2", "one"):
        loaded = train(parent, sharding, load=str(tmp_path / "buckets"), layout="dp_reshardable", after=3)
        assert loaded["middle"] == one["middle"]
        assert loaded["end"] == one["end"]


def test_nothing_is_clipped_at_zero_and_the_norm_is_still_there(parent: Parent, one: dict[str, Any]) -> None:
    free = train(parent, "one", clip_grad=0.0)
    assert free["log"][0][0] == one["log"][0][0]
    assert free["middle"] != one["middle"]


def test_a_checkpoint_without_a_state_is_refused(parent: Parent, tmp_path: Path) -> None:
    (said,) = parent.run(
        "tests.cases.optim:incomplete", arguments={"directory": str(tmp_path / "incomplete")}, timeout_s=TIMEOUT_S
    )
    strict, nemo_default, lenient = said
    assert strict.startswith("CheckpointingException: Unexpected keys (not found in the checkpoint)")
    assert "optimizer.state.exp_avg_slow." in strict
    assert nemo_default.startswith("CheckpointingException: Cannot find global shape metadata")
    assert re.fullmatch(
        r"InputError: the checkpoint holds \['exp_avg_fast', 'exp_avg_sq', 'param'\] of parameter [\w.]+, and the "
        r"optimizer needs \['exp_avg_fast', 'exp_avg_slow', 'exp_avg_sq', 'param'\]",
        lenient,
    )


def test_decay_is_for_matrices(parent: Parent) -> None:
    (decay,) = parent.run("tests.cases.optim:settings_of_groups", timeout_s=TIMEOUT_S)
    shapes = published_shapes(small_run(1).model)
    assert decay == {name: 0.1 if len(shape) == 2 else 0.0 for name, shape in shapes.items()}
    assert decay["model.embed_tokens.weight"] == decay["lm_head.weight"] == 0.1
    assert decay["model.layers.1.mlp.act_fn.alpha_p"] == decay["model.norm.weight"] == 0.0


def test_refusals(parent: Parent) -> None:
    said, _ = parent.run("tests.cases.optim:refusals", world_size=2, timeout_s=TIMEOUT_S)
    assert said == {
        "layout": "InputError: checkpoint layout fully_reshardable cannot hold AdEMAMix's three states: "
        "use fully_sharded_model_space",
        "parameter state": "InputError: checkpoint layout dp_zero_gather_scatter cannot hold AdEMAMix's three states: "
        "use fully_sharded_model_space",
        "step": "ApertusError: step 2 is to run, but the optimizer has done 0 steps",
        "samples": "ApertusError: 4 samples were consumed before step 1, and the recipe says 0",
        "not distributed": "InputError: parallel.distributed_optimizer is false: AdEMAMix needs the distributed "
        "optimizer, set it to true",
        "name": "InputError: optim.name is adam: only ademamix is known",
        "fp16": "InputError: AdEMAMix runs with float32 states: no fp16, loss scale, precision-aware or offloaded "
        "optimizer",
        "version": "UnfitEnvironment: megatron-core is 0.16.0, and AdEMAMix replaces methods of 0.15.3: "
        "install megatron-core==0.15.3",
        "mark": "ApertusError: parameter output_layer.weight of shape (32, 32) has tensor_model_parallel=False: "
        "its gradient would be counted wrongly",
    }


def test_the_replaced_lines_are_where_we_say(parent: Parent) -> None:
    (lines,) = parent.run("tests.cases.optim:replaced_lines", timeout_s=TIMEOUT_S)
    text = (Path(__file__).parents[3] / "apertus_nemo" / "optim" / "distributed.py").read_text().split('"""')[1]
    stated = {m[1]: [int(m[2]), int(m[3])] for m in re.finditer(r"^    (\w+) +l\.(\d+)-(\d+) ", text, re.MULTILINE)}
    assert stated == lines
