"""Weights in the dtype of the activations.

A single process keeps its weights in fp32 and computes in bf16 or fp16. The micro-batches of a step, and the tokens of
a generation, use the same weights: within `weights_unchanged` each is copied once. Sharded weights arrive in the right
dtype and pass through.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_copies: dict[int, tuple[Tensor, Tensor]] = {}  # id of a weight -> the weight, its copy
_uses = 0  # of `weights_unchanged` that are open


@contextmanager
def weights_unchanged() -> Iterator[None]:
    """No weight is written to in here, so that the copies that `cast` makes can be used again."""
    global _uses
    _uses += 1
    try:
        yield
    finally:
        _uses -= 1
        if _uses == 0:
            _copies.clear()


def copies_are_kept() -> bool:
    """Whether `cast` keeps what it makes."""
    return _uses > 0


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. A backward adds its gradient, in the dtype of the weight, to `weight.grad`."""
    if weight.dtype == dtype:
        return weight
    if _uses == 0 or torch.compiler.is_compiling():
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
        weight.grad.add_(grad)  # reads the gradient as it is: autograd would first write it out in fp32
        return None, None
