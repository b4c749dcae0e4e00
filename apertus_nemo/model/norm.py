"""RMSNorm for plain Megatron: works with sequence parallelism, and its statistics are always float32.

Formula (arXiv 1910.07467; `ApertusRMSNorm` of transformers): y = w * x / sqrt(mean(x^2) + eps), over the last
dimension. Megatron's own stand-in for machines without Transformer Engine refuses sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """Forward and backward written out: x and one scalar a row are kept, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = x.float() * scale
        product = grad.float() * normalised
        grad_weight = product.view(-1, x.shape[-1]).sum(0)
        wide_weight = weight.float()
        # dx = scale * (g w - n mean(g w n)), with n = x * scale
        mean = product.mul_(wide_weight).mean(-1, keepdim=True)
        grad_x = (grad.float() * wide_weight).sub_(normalised.mul_(mean)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, with the constructor that Megatron's `build_module` calls.

    Input and output [..., hidden_size] of any float type; float32 inside, rounded once at the end. The weight is
    replicated over tensor-parallel ranks. Under sequence parallelism each of them sees a part of the tokens:
    `weight.sequence_parallel` has Megatron's `finalize_model_grads` sum the gradients. The per-head norms of
    queries and keys see a part of the heads instead; there Megatron sums by name (`q_layernorm`, `k_layernorm`),
    with and without sequence parallelism, and once in either case.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        result: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return result
