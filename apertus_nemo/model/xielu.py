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

_CPU_ELEMENTS = 65_536  # a thread's share of a piece


def _not_above(values: Tensor, x: Tensor, bound: float) -> Tensor:
    """values where x <= bound, else 0; exact. On the CPU many times faster than torch.where and a mask."""
    above: Tensor = torch.ops.aten.threshold_backward(values, x, bound)
    return values - above


def _slopes(alpha_p: Tensor, alpha_n: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(a_p, a_n), float32."""
    softplus = torch.nn.functional.softplus
    return softplus(alpha_p.float()), beta + softplus(alpha_n.float())


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of a contiguous x: x itself on a GPU; on a CPU, of so few elements that its cache holds them."""
    if x.device.type != "cpu":
        return (x,)
    pieces: tuple[Tensor, ...] = torch.split(x.view(-1), _CPU_ELEMENTS * torch.get_num_threads())
    return pieces


class _XIELU(torch.autograd.Function):
    """Value and derivative written out, float32 inside; the input is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float, group: Any | None
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, alpha_p, alpha_n)
        ctx.beta, ctx.eps, ctx.group = beta, eps, group
        slope_p, slope_n = _slopes(alpha_p, alpha_n, beta)
        result = torch.empty_like(x)
        for piece, into in zip(_pieces(x), _pieces(result), strict=True):
            wide = piece.float()
            value = _not_above(wide.clamp(max=eps).expm1_().sub_(wide), wide, 0.0).mul_(slope_n)
            positive = wide.clamp(min=0.0)
            value.add_(positive.mul_(positive).mul_(slope_p))
            into.copy_(value.add_(wide, alpha=beta))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, alpha_p, alpha_n = ctx.saved_tensors
        slope_p, slope_n = _slopes(alpha_p, alpha_n, ctx.beta)
        grad_x = torch.empty_like(x)
        sums = []  # derivatives by a_p and a_n, of each piece
        for piece, given, into in zip(_pieces(x), _pieces(grad.contiguous()), _pieces(grad_x), strict=True):
            wide, wide_grad = piece.float(), given.float()
            curve = wide.clamp(max=ctx.eps).expm1_()
            positive = wide.clamp(min=0.0)
            grad_positive = wide_grad * positive
            grad_negative = _not_above(wide_grad, wide, 0.0)
            sums += [positive.mul_(grad_positive).sum(), (curve - wide).mul_(grad_negative).sum()]

            # by x: 2 a_p x + beta, or a_n (exp(x) - 1) + beta, where exp(x) is 0 in its stead for eps < x <= 0
            slope = _not_above(curve.add_(1.0), wide, ctx.eps).sub_(1.0).mul_(slope_n).mul_(grad_negative)
            into.copy_(slope.add_(grad_positive.mul_(2.0 * slope_p)).add_(wide_grad, alpha=ctx.beta))

        # over this rank's slice of ffn, then over all slices
        total = torch.stack(sums).view(-1, 2).sum(0)
        if ctx.group is not None and ctx.group.size() > 1:
            torch.distributed.all_reduce(total, group=ctx.group)
        grad_p = total[0] * torch.sigmoid(alpha_p.float())
        grad_n = total[1] * torch.sigmoid(alpha_n.float())
        return grad_x, grad_p.to(alpha_p.dtype), grad_n.to(alpha_n.dtype), None, None, None


class XIELU(torch.nn.Module):
    """xIELU with learned scalars `alpha_p` and `alpha_n`, shape [1] each.

    Plugged in as `MLPSubmodules.activation_func` (with `use_te_activation_func`, Megatron's switch for "the
    activation is a module"). Input and output [sequence, batch, ffn / tensor-parallel size], of any float type.

    The scalars are replicated over tensor-parallel ranks, each of which sees its slice of ffn: the gradient is the
    sum over the slices, taken inside the backward pass ("as_intended"). It is the same with sequence parallelism,
    where this activation still sees every token. The parameters therefore carry no `sequence_parallel` mark
    (Megatron would sum again), and `tensor_model_parallel` is False: the gradient norm counts them once.

    "as_published": no sum is taken, as in the published runs (read from swiss-ai/Megatron-LM: its gradients are summed
    for marked parameters only, and these had no mark). Each tensor-parallel rank trains scalars of its own from its
    slice; the gradient norm counts the first rank's. Checkpoints hold all of them, [tensor-parallel size] a layer.
    "as_published_restart": the same, with checkpoints that hold the first rank's alone, which all ranks take on a
    restart, as the published runs did.
    """

    def __init__(
        self, config: Any, *, beta: float = 0.5, eps: float = -1e-6, tensor_parallel_gradient: str = "as_intended"
    ) -> None:
        super().__init__()
        self.beta, self.eps = beta, eps
        self.summed = tensor_parallel_gradient == "as_intended"
        self.kept = tensor_parallel_gradient == "as_published"
        self.alpha_p = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.alpha_n = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply xIELU elementwise."""
        group = parallel_state.get_tensor_model_parallel_group(check_initialized=False) if self.summed else None
        result: Tensor = _XIELU.apply(  # type: ignore[no-untyped-call]
            x, self.alpha_p, self.alpha_n, self.beta, self.eps, group
        )
        return result

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """For torch_dist checkpoints: one pair for each layer, or, "as_published", one for each rank of each layer."""
        axes = {"alpha_p": 0, "alpha_n": 0} if self.kept else {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets
        )
