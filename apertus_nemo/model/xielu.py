"""xIELU, the activation of Apertus (arXiv 2411.13010), for Megatron's MLP.

With a_p = softplus(alpha_p), a_n = beta + softplus(alpha_n), beta = 0.5 and eps = -1e-6:

    x > 0:   a_p x^2 + beta x
    x <= 0:  a_n (expm1(min(x, eps)) - x) + beta x

alpha_p and alpha_n are learned, one pair a layer. The value jumps by about 8e-7 at 0: eps is part of the published
function, and its derivative is taken as it stands (for eps < x <= 0 expm1's part is constant).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from apertus_nemo.errors import InputError


class _XIELU(torch.autograd.Function):
    """Value and derivative written out, float32 inside; the input is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float, group: Any | None
    ) -> Tensor:
        ctx.save_for_backward(x, alpha_p, alpha_n)
        ctx.beta, ctx.eps, ctx.group = beta, eps, group
        wide = x.float()
        slope_p = torch.nn.functional.softplus(alpha_p.float())
        slope_n = beta + torch.nn.functional.softplus(alpha_n.float())
        negative = wide.clamp(max=eps).expm1_().sub_(wide).mul_(slope_n)
        positive = (wide * slope_p).mul_(wide)
        return torch.where(wide > 0, positive, negative).add_(wide, alpha=beta).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, alpha_p, alpha_n = ctx.saved_tensors
        wide, wide_grad = x.float(), grad.float()
        slope_p = torch.nn.functional.softplus(alpha_p.float())
        slope_n = ctx.beta + torch.nn.functional.softplus(alpha_n.float())
        positive = wide.clamp(min=0)
        curve = wide.clamp(max=ctx.eps).expm1_()  # of x <= 0 only; for x > 0 masked below

        # sums over the ffn slice of this rank; over all slices below
        weighted = wide_grad * positive
        sum_p = (weighted * positive).sum()
        below = wide <= 0
        sum_n = ((curve - wide) * wide_grad).mul_(below).sum()

        # x <= 0: a_n (exp(x) [x < eps] - 1) + beta; with exp(x) - 1 = expm1(x), and -1 alone above eps
        inner = torch.where(wide < ctx.eps, curve, -1.0).mul_(slope_n)
        outer = positive.mul_(2.0 * slope_p)
        grad_x = torch.where(below, inner, outer).add_(ctx.beta).mul_(wide_grad)

        sums = torch.stack((sum_p, sum_n))
        if ctx.group is not None and ctx.group.size() > 1:
            torch.distributed.all_reduce(sums, group=ctx.group)
        grad_p = sums[0] * torch.sigmoid(alpha_p.float())
        grad_n = sums[1] * torch.sigmoid(alpha_n.float())
        return grad_x.to(x.dtype), grad_p.to(alpha_p.dtype), grad_n.to(alpha_n.dtype), None, None, None


class XIELU(torch.nn.Module):
    """xIELU with learned scalars `alpha_p` and `alpha_n`, shape [1] each.

    Plugged in as `MLPSubmodules.activation_func` (with `use_te_activation_func`, Megatron's switch for "the
    activation is a module"). Input and output [sequence, batch, ffn / tensor-parallel size], of any float type.

    The scalars are replicated over tensor-parallel ranks, each of which sees its slice of ffn: the gradient is the
    sum over the slices, taken inside the backward pass ("as_intended"). It is the same with sequence parallelism,
    where this activation still sees every token. The parameters therefore carry no `sequence_parallel` mark
    (Megatron would sum again), and `tensor_model_parallel` is False: the gradient norm counts them once.
    """

    def __init__(
        self, config: Any, *, beta: float = 0.5, eps: float = -1e-6, tensor_parallel_gradient: str = "as_intended"
    ) -> None:
        super().__init__()
        if tensor_parallel_gradient != "as_intended":
            raise InputError(
                f"model.xielu_tensor_parallel_gradient is {tensor_parallel_gradient!r}: only 'as_intended' exists so far"
            )
        self.beta, self.eps = beta, eps
        self.alpha_p = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.alpha_n = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply xIELU elementwise."""
        group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        result: Tensor = _XIELU.apply(  # type: ignore[no-untyped-call]
            x, self.alpha_p, self.alpha_n, self.beta, self.eps, group
        )
        return result

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """For torch_dist checkpoints: replicated over tensor-parallel ranks, one pair for each layer."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )
