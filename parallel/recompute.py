"""Recomputation by structure: which parts of a block keep their inputs only, and run again in the backward.

Each part is recomputed alone, so that no collective is repeated and none is left waiting for, and rows leave and arrive
in the same order as without.
- `selective`: the norm and attention; the experts' SwiGLU.
- `full`: besides, the residual sum after attention with the second norm; the router, whose choice is kept, or near ties
  could fall otherwise the second time; the first half of the shared expert, and a dense feed-forward.
What a layer keeps under `full`: its input, what attention adds to it, the second norm's output, the rows that arrived,
and the shared expert's hidden layer.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.moe import FeedForward, MoE
from model.transformer import Block


def recompute(model: nn.Module, mode: str) -> None:
    """Make the blocks of a model recompute by `mode`: none, selective or full."""
    for block in model.modules():
        if not isinstance(block, Block) or mode == "none":
            continue
        inner = block.feed_forward
        _again(block, "attend")
        if isinstance(inner, MoE):
            _again(inner.experts, "swiglu")
        if mode == "full":
            _again(block, "join")
            if isinstance(inner, FeedForward):
                _again(inner, "forward")
            else:
                keep_choice = partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
                _again(inner.router, "forward", context_fn=keep_choice)
                if inner.shared is not None:
                    _again(inner.shared, "widen")


def _again(module: nn.Module, method: str, **options: Any) -> None:
    setattr(module, method, partial(checkpoint, getattr(module, method), use_reentrant=False, **options))
