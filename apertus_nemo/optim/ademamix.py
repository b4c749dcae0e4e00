"""AdEMAMix (arXiv 2409.03137) as the published runs used it, with bits that do not depend on how tensors are cut.

    optimizer = AdEMAMix(parameters, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, schedule=schedule)

`schedule(step)` gives learning rate, alpha and beta3 of the 1-based step. The only state besides the three averages is
the `step` in each parameter group, so that whoever restores these resumes exactly.

With g the gradient, t the step, all in float32:

    fast <- beta1 fast + (1 - beta1) g            slow <- beta3(t) slow + (1 - beta3(t)) g
    sq   <- beta2 sq + (1 - beta2) g^2
    p    <- p - lr (  (fast / (1 - beta1^t) + alpha(t) slow) / (sqrt(sq) / sqrt(1 - beta2^t) + eps)  +  decay p  )

Decay is inside the bracket, multiplied by the learning rate; the slow average is not bias-corrected.

Bits. `_update` is a fixed sequence of additions, multiplications, divisions and square roots of float32, each rounded
once (IEEE 754): no fused multiply-add, no division by a scalar (CUDA multiplies by the reciprocal instead), and no
`torch.sqrt` on the CPU (MKL's vector library rounds it one way or the other). Hence an element's new bits depend on its
own old bits alone: not on its place in a shard, the instruction set or the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from apertus_nemo.errors import ApertusError
from apertus_nemo.optim.schedule import StepSettings

STATES = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")

_CPU_BATCH = 65_536  # elements that one thread updates in its cache; torch gives no thread less than 32,768
_DEVICE_BATCH = 32 * 1024 * 1024  # elements; bounds the scratch memory to some 400 MiB


class AdEMAMix(torch.optim.AdamW):
    """Optimizer with three float32 states for each parameter and the step in the group.

    It is an AdamW in name only: Megatron's distributed optimizer accepts nothing else
    (megatron-core 0.15.3, optimizer/distrib_optimizer.py l.510). None of AdamW's own code runs.

    Parameters must be float32 (main parameters, where the model is in bfloat16). States are made at the
    first step or by `allocate_states`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        schedule: Callable[[int], StepSettings],
    ) -> None:
        """`params`: tensors or parameter groups; `weight_decay` is that of a group which names none."""
        self.schedule = schedule
        defaults = {"lr": schedule(1).lr, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2, "eps": eps}
        torch.optim.Optimizer.__init__(self, params, {**defaults, "step": 0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore attributes; AdamW's own version would look for a `step` tensor beside each parameter's state."""
        torch.optim.Optimizer.__setstate__(self, state)

    @property
    def steps_done(self) -> int:
        """Steps completed. Raises ApertusError where the groups disagree."""
        steps = {int(group["step"]) for group in self.param_groups}
        if len(steps) != 1:
            raise ApertusError(f"parameter groups of the optimizer stand at different steps: {sorted(steps)}")
        return steps.pop()

    @torch.no_grad()
    def allocate_states(self) -> None:
        """Zeros for every state that is not there yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in STATES:
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format).detach()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = self.steps_done + 1
        settings = self.schedule(step)
        self.allocate_states()
        for group in self.param_groups:
            group["step"] = step
            group["lr"] = settings.lr
            scalars = _scalars(group, settings, step)
            for batch in _batches([self._tensors(p) for p in group["params"] if p.grad is not None]):
                _update(batch, scalars)
        return loss

    def _tensors(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Parameter, gradient and the three states, each as a 1-D view."""
        gradient = parameter.grad
        assert gradient is not None
        if parameter.dtype != torch.float32 or gradient.dtype != torch.float32:
            raise ApertusError(f"AdEMAMix updates float32 only, not {parameter.dtype} with {gradient.dtype} gradients")
        state = self.state[parameter]
        tensors = (parameter.detach(), gradient.detach().contiguous(), *(state[name] for name in STATES))
        return tuple(tensor.view(-1) for tensor in tensors)


def _scalars(group: dict[str, Any], settings: StepSettings, step: int) -> dict[str, float]:
    """Constants of one step and group, in double precision; each is rounded to float32 where it is used."""
    beta1, beta2 = group["beta1"], group["beta2"]
    return {
        "beta1": beta1,
        "beta2": beta2,
        "beta3": settings.beta3,
        "alpha": settings.alpha,
        "fast_scale": 1.0 / (1.0 - beta1**step),
        "sqrt_scale": 1.0 / math.sqrt(1.0 - beta2**step),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "lr": settings.lr,
    }


def _batches(rows: list[tuple[torch.Tensor, ...]]) -> Iterator[tuple[list[torch.Tensor], ...]]:
    """Cut and gather 1-D tensors into batches of so few elements that all passes over one find it in the cache.

    Each row holds the tensors of one parameter, all of one length; each batch holds as many lists as a row has
    tensors. On a GPU the batch bounds the scratch memory instead.
    """
    batch: list[tuple[torch.Tensor, ...]] = []
    held = 0
    for row in rows:
        size = _CPU_BATCH * torch.get_num_threads() if row[0].device.type == "cpu" else _DEVICE_BATCH
        numel = row[0].numel()
        for start in range(0, numel, size):
            piece = row if numel <= size else tuple(tensor[start : start + size] for tensor in row)
            if batch and held + piece[0].numel() > size:
                yield tuple(map(list, zip(*batch, strict=True)))
                batch, held = [], 0
            batch.append(piece)
            held += piece[0].numel()
    if batch:
        yield tuple(map(list, zip(*batch, strict=True)))


def _update(batch: tuple[list[torch.Tensor], ...], c: dict[str, float]) -> None:
    """Update in place: parameters, gradients and the three states, as parallel lists of 1-D float32 tensors.

    The order of operations is part of the contract: tests/unit/optim/test_ademamix.py has it in numpy.
    """
    p, g, fast, slow, square = batch
    for average, beta in ((fast, c["beta1"]), (slow, c["beta3"])):
        part = torch._foreach_mul(g, 1.0 - beta)
        torch._foreach_mul_(average, beta)
        torch._foreach_add_(average, part)
    part = torch._foreach_mul(g, g)
    torch._foreach_mul_(part, 1.0 - c["beta2"])
    torch._foreach_mul_(square, c["beta2"])
    torch._foreach_add_(square, part)

    denominator = _root(square)
    torch._foreach_mul_(denominator, c["sqrt_scale"])
    torch._foreach_add_(denominator, c["eps"])
    update = torch._foreach_mul(fast, c["fast_scale"])
    torch._foreach_add_(update, torch._foreach_mul(slow, c["alpha"]))
    torch._foreach_div_(update, denominator)
    if c["weight_decay"] != 0.0:
        torch._foreach_add_(update, torch._foreach_mul(p, c["weight_decay"]))
    torch._foreach_mul_(update, c["lr"])
    torch._foreach_sub_(p, update)


def _root(x: list[torch.Tensor]) -> list[torch.Tensor]:
    """1 / (1 / sqrt(x)), each operation rounded once; 0 for 0."""
    if x[0].device.type == "cpu":
        root = torch._foreach_rsqrt(x)  # on the CPU a square root and a division, both IEEE
    else:
        root = torch._foreach_sqrt(x)
        torch._foreach_reciprocal_(root)
    torch._foreach_reciprocal_(root)
    return list(root)
