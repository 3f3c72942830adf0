"""train.compile: torch.compile for the parts of the model that are declared with `@part(compile=True)`
(`model/parts.py`), each part alone.

These parts are between matrix multiplications, and each becomes one or two kernels: dropout of the embedding; RoPE and
the norm of queries and keys, or the scaling of queries; after attention, dropout, the residual sum and the second norm;
the SwiGLU activation; in an MoE, the gather of rows into expert order, and the sum of the experts' outputs; after the
feed-forward, dropout and the residual sum; the statistics of all routers; in the head, the loss and the gradient of a
chunk of logits. Matrix multiplications, attention, routing and the exchange of rows are not compiled.

A part is compiled at its first use in training. Evaluation and generation use the plain method, because their
sequences have many lengths.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model.parts import parts_of


def compile_parts(model: nn.Module) -> None:
    """Make the parts of a model that are declared with `@part(compile=True)` run compiled in training."""
    for module, part in parts_of(model):
        if part.compile:
            part.wrap(module, _compiled_in_training(module, part.dynamic))


def _compiled_in_training(module: nn.Module, dynamic: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrapper(method: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(method, dynamic=dynamic)

        def call(*args: Any) -> Any:
            return compiled(*args) if module.training else method(*args)

        return call

    return wrapper
