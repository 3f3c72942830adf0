"""Weights in the dtype of the activations.

A single process keeps its weights in fp32 and computes in bf16 or fp16. The micro-batches of a step use the same
weights, and so do the tokens of a generation: within `weights_unchanged` each weight is copied only once. Sharded
weights arrive in the right dtype, and `cast` returns them as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_copies: dict[int, tuple[Tensor, Tensor]] = {}  # id of a weight -> the weight, its copy
_depth = 0  # of nested `weights_unchanged`


@contextmanager
def weights_unchanged() -> Iterator[None]:
    """Promise that no weight is written in this context, so that the copies that `cast` makes can be used again."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _copies.clear()


def copies_are_kept() -> bool:
    """Whether `cast` keeps the copies that it makes."""
    return _depth > 0


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. A backward adds its gradient, in the dtype of the weight, to `weight.grad`."""
    if weight.dtype == dtype:
        return weight
    if not copies_are_kept() or torch.compiler.is_compiling():
        return weight.to(dtype)
    _, copy = _copies.get(id(weight), (weight, None))
    if copy is None or copy.dtype != dtype:
        copy = weight.detach().to(dtype)
        _copies[id(weight)] = weight, copy
    return _Cast.apply(weight, copy) if torch.is_grad_enabled() and weight.requires_grad else copy


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.weight = weight
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        weight = ctx.weight
        if not weight.is_leaf or weight.grad is None:
            return grad.to(weight.dtype), None
        weight.grad.add_(grad)  # reads the gradient in its own dtype; autograd would first write it in fp32
        return None, None
