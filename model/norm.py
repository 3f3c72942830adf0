"""RMS norm (arXiv:1910.07467), whose sums are in fp32 or wider. Letters: D dim."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.initial_values import ONES
from model.precision import cast


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.initial_values = {"weight": ONES}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (..., D) over its root mean square, times weight (D,) if there is one, in the dtype of x."""
    if x.device.type == "cuda" and not torch.compiler.is_compiling():
        # The CUDA kernel reads bf16 or fp16 and adds in fp32, provided that the weight has the same dtype.
        return F.rms_norm(x, x.shape[-1:], weight if weight is None else cast(weight, x.dtype), eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight if weight is None else weight.to(wide)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        wide_x = x.to(wide)
        out = _RMSNorm.apply(wide_x, weight, eps) if torch.is_grad_enabled() else _norm(wide_x, weight, eps)[0]
        return out.to(x.dtype)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight, eps).to(x.dtype)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the norm of x (..., D), and the factor (..., 1) of each vector of D numbers."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale if weight is None else (x * scale).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """RMS norm on a CPU. The one of torch takes three times as long, because its backward is many small operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        out, scale = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        product = (grad * x).flatten(0, -2)
        if weight is None:
            dot, grad_weight = product.sum(-1), None
        else:
            dot = product @ weight
            grad_weight = scale.flatten() @ product
            grad = grad * weight
        dot = dot.view_as(scale) * scale.pow(3).div_(-x.shape[-1])
        return (grad * scale).addcmul_(x, dot), grad_weight, None
