"""AdEMAMix against float64, against the same operations in numpy to the bit, and cut in every way."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from apertus_nemo.errors import ApertusError  # noqa: E402
from apertus_nemo.optim.ademamix import STATES, AdEMAMix  # noqa: E402
from apertus_nemo.optim.schedule import StepSettings  # noqa: E402

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
Arrays = dict[str, Any]


def schedule(step: int) -> StepSettings:
    """Everything moves, as in a warm-up of 40 steps."""
    a = min(step / 40, 1.0)
    half = (1 - a) * (math.log(0.5) / math.log(0.9) - 1) + a * (math.log(0.5) / math.log(0.9999) - 1)
    return StepSettings(lr=1e-3 * a, alpha=8.0 * a, beta3=0.5 ** (1 / (half + 1)))


def gradients(size: int, steps: int, seed: int = 0) -> Any:
    """Gradients of many magnitudes, some zero."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((steps, size)) * 10.0 ** generator.uniform(-9, 2, (steps, size))
    values[:, ::97] = 0.0
    return values.astype(np.float32)


def reference(start: Any, grads: Any, decay: float, kind: type) -> Arrays:
    """AdEMAMix as the reference states it; `kind` is float64, or float32 for the very operations of the optimizer."""
    p, m1, m2, v = start.astype(kind), *(np.zeros(start.size, kind) for _ in range(3))
    for step, g in enumerate(grads.astype(kind), start=1):
        s = schedule(step)
        m1 = m1 * kind(BETA1) + g * kind(1 - BETA1)
        m2 = m2 * kind(s.beta3) + g * kind(1 - s.beta3)
        v = v * kind(BETA2) + (g * g) * kind(1 - BETA2)
        if kind is np.float64:
            denominator = np.sqrt(v) / math.sqrt(1 - BETA2**step) + EPS
            p = p - s.lr * ((m1 / (1 - BETA1**step) + s.alpha * m2) / denominator + decay * p)
            continue
        one = kind(1)
        with np.errstate(divide="ignore"):
            root = one / (one / np.sqrt(v))
        denominator = root * kind(1 / math.sqrt(1 - BETA2**step)) + kind(EPS)
        update = (m1 * kind(1 / (1 - BETA1**step)) + m2 * kind(s.alpha)) / denominator
        if decay:
            update = update + p * kind(decay)
        p = p - update * kind(s.lr)
    return {"p": p, "exp_avg_fast": m1, "exp_avg_slow": m2, "exp_avg_sq": v}


def optimizer(parameters: Any, decay: float = 0.1) -> AdEMAMix:
    return AdEMAMix(parameters, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=decay, schedule=schedule)


def run(start: Any, grads: Any, decay: float, cuts: list[int], device: str = "cpu") -> Arrays:
    """Train the vector cut at `cuts`; each part is a parameter of its own."""
    bounds = [0, *cuts, start.size]
    parts = [torch.tensor(start[a:b], device=device) for a, b in itertools.pairwise(bounds)]
    ours = optimizer(parts, decay)
    for g in grads:
        for part, a, b in zip(parts, bounds[:-1], bounds[1:], strict=True):
            part.grad = torch.tensor(g[a:b], device=device)
        ours.step()
    assert ours.steps_done == len(grads)
    result = {name: torch.cat([ours.state[part][name] for part in parts]).cpu().numpy() for name in STATES}
    return {"p": torch.cat(parts).cpu().numpy(), **result}


def same_bits(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_agrees_with_float64(decay: float) -> None:
    start, grads = np.random.default_rng(1).standard_normal(5000).astype(np.float32), gradients(5000, 60)
    ours, exact = run(start, grads, decay, []), reference(start, grads, decay, np.float64)
    for name in ours:
        # averages cancel: the error is one of float32 relative to what was summed
        scale = np.abs(grads).max(axis=0) if name.startswith("exp_avg") else np.ones(5000)
        scale = scale**2 if name == "exp_avg_sq" else scale
        assert (np.abs(ours[name] - exact[name]) <= 4e-6 * scale + 1e-30).all(), name
    moved = np.abs(exact["p"] - start)
    assert np.median(moved) > 1e-3
    assert (np.abs(ours["p"] - exact["p"]) <= 1e-5 * moved + 5e-6).all()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_operation_is_rounded_once(decay: float) -> None:
    """The same additions, multiplications, divisions and roots in numpy's float32 give the same bits."""
    start, grads = np.random.default_rng(2).standard_normal(70_001).astype(np.float32), gradients(70_001, 12, seed=2)
    same_bits(run(start, grads, decay, []), reference(start, grads, decay, np.float32))


def test_bits_do_not_depend_on_cuts() -> None:
    size = 100_003  # several batches, no multiple of a vector register
    generator = np.random.default_rng(3)
    start, grads = generator.standard_normal(size).astype(np.float32), gradients(size, 5, seed=3)
    whole = run(start, grads, 0.1, [])
    for count in (1, 7, 1500):
        same_bits(run(start, grads, 0.1, sorted(generator.choice(size, count, replace=False).tolist())), whole)


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_the_cpu() -> None:
    start, grads = np.random.default_rng(6).standard_normal(100_003).astype(np.float32), gradients(100_003, 10, seed=6)
    same_bits(run(start, grads, 0.1, [5, 777], device="cuda"), reference(start, grads, 0.1, np.float32))


def digest() -> str:
    """Of everything after three steps on tensors of several sizes."""
    start, grads = np.random.default_rng(4).standard_normal(150_001).astype(np.float32), gradients(150_001, 3, seed=4)
    return hashlib.sha256(b"".join(v.tobytes() for v in run(start, grads, 0.1, [5, 777]).values())).hexdigest()


_CHILD = """
import torch
from tests.unit.optim.test_ademamix import digest
torch.set_num_threads(2)
print(torch.backends.cpu.get_cpu_capability(), digest())
"""


@pytest.mark.parametrize("capability", ["default", pytest.param("avx2", marks=pytest.mark.full)])
def test_bits_do_not_depend_on_instruction_set_or_threads(capability: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", _CHILD],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [capability.upper(), digest()]


def test_resumes_from_states_and_step_alone() -> None:
    start, grads = np.random.default_rng(5).standard_normal(1000).astype(np.float32), gradients(1000, 50, seed=5)
    first = torch.tensor(start)
    before = optimizer([first])
    for g in grads[:20]:
        first.grad = torch.tensor(g)
        before.step()
    second = first.clone()
    after = optimizer([second])
    after.load_state_dict(before.state_dict())
    assert after.steps_done == 20
    for g in grads[20:]:
        second.grad = torch.tensor(g)
        after.step()
    assert second.numpy().tobytes() == run(start, grads, 0.1, [])["p"].tobytes()


def test_groups_have_their_own_decay_and_a_step_even_when_empty() -> None:
    a, b = torch.ones(3), torch.ones(3)
    ours = optimizer([{"params": [a], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.0}])
    ours.add_param_group({"params": []})
    for parameter in (a, b):
        parameter.grad = torch.zeros(3)
    ours.step()
    assert torch.equal(a, torch.ones(3) - torch.tensor(0.5) * torch.tensor(1e-3 / 40))
    assert torch.equal(b, torch.ones(3))
    assert [group["step"] for group in ours.param_groups] == [1, 1, 1]
    assert [group["lr"] for group in ours.param_groups] == [1e-3 / 40] * 3


def test_refuses_other_types_and_groups_at_different_steps() -> None:
    half = torch.ones(3, dtype=torch.bfloat16)
    half.grad = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ApertusError, match=r"AdEMAMix updates float32 only, not torch.bfloat16"):
        optimizer([half]).step()
    ours = optimizer([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}])
    ours.param_groups[1]["step"] = 3
    with pytest.raises(ApertusError, match=r"at different steps: \[0, 3\]"):
        ours.step()
