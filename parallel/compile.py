"""torch.compile by parts, each alone: what has fixed shapes, no message and no choice in it.

The norm before attention with the projection to queries, keys and values; a dense feed-forward; the shared expert's two
halves. Fused attention, routing and the exchange of rows stay outside, whose shapes or sizes differ from step to step.
A part is compiled at its first use in training, and used in training only: evaluation and generation meet many lengths.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model.moe import FeedForward, MoE
from model.transformer import Block


def compile_parts(model: nn.Module) -> None:
    """Make the blocks of a model run their parts compiled."""
    for block in model.modules():
        if isinstance(block, Block):
            inner = block.feed_forward
            _compile(block, "qkv")
            if isinstance(inner, FeedForward):
                _compile(inner, "forward")
            elif isinstance(inner, MoE) and inner.shared is not None:
                _compile(inner.shared, "widen")
                _compile(inner.shared, "narrow")


def _compile(module: nn.Module, method: str) -> None:
    plain: Callable[..., Any] = getattr(module, method)
    fast = torch.compile(plain, dynamic=False)
    setattr(module, method, lambda *args: (fast if module.training else plain)(*args))
