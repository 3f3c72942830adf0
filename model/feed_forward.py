"""The dense feed-forward layer, with the SwiGLU activation (arXiv:2002.05202). Letters: D dim, F hidden."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.initial_values import residual_normal, scaled_normal
from model.parts import part
from model.precision import cast


class FeedForward(nn.Module):
    """x -> down(silu(gate(x)) * up(x)), where one matrix multiplication computes gate and up."""

    def __init__(self, config: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden, config.dim))
        self.down = nn.Parameter(torch.empty(config.dim, hidden))
        self.initial_values = {
            "gate_up": scaled_normal(config.dim),
            "down": residual_normal(hidden, config.n_layers),
        }

    @part(recompute="full")
    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.project_down(self.project_up(x))

    def project_up(self, x: Tensor) -> Tensor:
        """The first half: x (..., D) -> (..., F)."""
        return self.activate(F.linear(x, cast(self.gate_up, x.dtype)))

    @part(compile=True)
    def activate(self, x: Tensor) -> Tensor:
        """The SwiGLU activation: x (..., 2F) -> (..., F)."""
        return swiglu(x)

    def project_down(self, hidden: Tensor) -> Tensor:
        """The second half: hidden (..., F) -> (..., D)."""
        return F.linear(hidden, cast(self.down, hidden.dtype))


def swiglu(x: Tensor) -> Tensor:
    """The SwiGLU activation: x (..., 2F), gate and up -> silu(gate) * up (..., F).

    Keeps only x for the backward.
    """
    if torch.compiler.is_compiling():  # the compiler makes one kernel of it, and chooses what to keep
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(x) if torch.is_grad_enabled() else _swiglu(x)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)  # written in place, so that no copy joins them
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x
