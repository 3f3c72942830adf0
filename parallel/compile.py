"""torch.compile by parts, each alone: what has no message and no choice in it.

A part lies between products, and becomes one kernel or two: dropout of the embedding; RoPE with the norm of queries and
keys. After attention: dropout, the residual sum and the second norm. In the mixture: the rows laid out in expert order,
SwiGLU, and the sum of what the experts made; the statistics of all routers. In the head: the loss and the gradient of a
chunk of logits. Products, attention, routing and the exchange of rows stay outside.

A part is compiled at its first use in training, and used in training only: evaluation and generation meet many lengths.
The number of rows that experts receive differs from step to step, so their SwiGLU is compiled for any number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from model.loss import chunk_gradient, linear_cross_entropy
from model.moe import FeedForward, MoE
from model.transformer import Block, Transformer


def compile_parts(model: Transformer) -> None:
    """Make a model run its parts compiled, in training."""
    for block in model.modules():
        if isinstance(block, Block):
            inner = block.feed_forward
            _compile(block, "join")
            _compile(block, "add")
            _compile(block.attention, "position")
            if isinstance(inner, FeedForward):
                _compile(inner, "activate")
            elif isinstance(inner, MoE):
                _compile(inner, "permute")
                _compile(inner, "combine")
                _compile(inner.experts, "activate", dynamic=True)
                if inner.shared is not None:
                    _compile(inner.shared, "activate")
    _compile(model, "drop")
    _compile(model, "statistics")
    model.head.loss = partial(linear_cross_entropy, gradient=torch.compile(chunk_gradient, dynamic=False))


def _compile(module: nn.Module, method: str, dynamic: bool = False) -> None:
    plain: Callable[..., Any] = getattr(module, method)
    fast = torch.compile(plain, dynamic=dynamic)
    setattr(module, method, lambda *args: (fast if module.training else plain)(*args))
