"""Token order -> expert order and back: rows are gathered, and so are their gradients.

Nothing is added into shared rows, in the forward or in the backward, so results are exact and deterministic on a GPU.

T tokens of width D with K choices each give R = T K rows. `order` (R,) is the choice of each row, `inverse` (R,) the
row of each choice. Rows from `count` on belong to no expert: padding, whose output and gradient are zero.
"""

from typing import Any

import torch
from torch import Tensor


def sort_choices(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """experts (T, K), n_experts for no expert -> order and inverse of rows sorted by expert, in the order of tokens."""
    # A radix sort passes once over each byte of its keys.
    narrow = torch.uint8 if n_experts < 256 else torch.int16 if n_experts < 1 << 15 else torch.int64
    order = torch.argsort(experts.flatten().to(narrow), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, inverse


def permute(tokens: Tensor, scores: Tensor, order: Tensor, inverse: Tensor, count: Tensor) -> Tensor:
    """tokens (T, D), scores (T, K) -> rows (R, D) in expert order, each times its score."""
    return _Permute.apply(tokens, scores, order, inverse, count)


def unpermute(rows: Tensor, order: Tensor, inverse: Tensor, count: Tensor, top_k: int) -> Tensor:
    """rows (R, D) in expert order -> (T, D): the sum of each token's rows."""
    return _Unpermute.apply(rows, order, inverse, count, top_k)


def _by_choice(rows: Tensor, inverse: Tensor, count: Tensor, top_k: int) -> Tensor:
    """rows (R, D) in expert order -> (T, K, D), zero for padding."""
    chosen = rows.index_select(0, inverse)
    padding = (inverse >= count)[:, None]
    # Compiled, one kernel gathers and masks; else masking in place spares a copy.
    chosen = chosen.masked_fill(padding, 0) if torch.compiler.is_compiling() else chosen.masked_fill_(padding, 0)
    return chosen.unflatten(0, (-1, top_k))


def _sum_choices(x: Tensor) -> Tensor:
    """(T, K, D) -> (T, D)."""
    return x.squeeze(1) if x.shape[1] == 1 else x.sum(1)


def _token_of(order: Tensor, top_k: int) -> Tensor:
    return order if top_k == 1 else order // top_k


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, scores: Tensor, order: Tensor, inverse: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, scores, inverse, count)
        rows = tokens.index_select(0, _token_of(order, scores.shape[1]))
        return rows * scores.flatten().index_select(0, order)[:, None].to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        tokens, scores, inverse, count = ctx.saved_tensors
        chosen = _by_choice(grad, inverse, count, scores.shape[1])
        to_tokens = _sum_choices(chosen * scores[..., None].to(grad.dtype))
        to_scores = (chosen * tokens[:, None]).sum(-1).to(scores.dtype)
        return to_tokens, to_scores, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, count: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _sum_choices(_by_choice(rows, inverse, count, top_k))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, _token_of(order, ctx.top_k)), None, None, None, None
