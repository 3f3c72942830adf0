"""Permutations of rows: from token order to expert order and back, and from packed rows to padded segments and back.

Rows are moved only by gathers (`index_select`), in the forward and in the backward; `permute` also multiplies each row
by its score, and `unpermute` sums the rows of each token. There are no scatter-adds, so results are deterministic on a
GPU.

Letters: T tokens, K choices of each token (top-k), R rows, D dim, P padded indices: tokens and padding of all segments.

`order` and `inverse` (R,) are a permutation and its inverse. In expert order there are R = T K rows, and `order[i]` is
the index of the choice (token * K + k) in row i. The first `n_real` rows (a 0-dim tensor) belong to an expert. The rows
after those are padding, whose output and gradient are zero.
"""

from typing import Any

import torch
from torch import Tensor


def sort_by_expert(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """experts (T, K) or (R,) -> order and inverse of rows sorted by expert, then by token.

    experts are expert ids; id n_experts means none.
    """
    # A radix sort makes one pass for each byte of its keys, so the keys are as narrow as possible.
    if n_experts < 1 << 8:
        key_dtype = torch.uint8
    elif n_experts < 1 << 15:
        key_dtype = torch.int16
    else:
        key_dtype = torch.int64
    order = torch.argsort(experts.flatten().to(key_dtype), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, inverse


def permute(tokens: Tensor, scores: Tensor, order: Tensor, inverse: Tensor, n_real: Tensor) -> Tensor:
    """tokens (T, D), scores (T, K) -> rows (R, D) in expert order, each multiplied by its score."""
    return _Permute.apply(tokens, scores, order, inverse, n_real)


def unpermute(rows: Tensor, order: Tensor, inverse: Tensor, n_real: Tensor, top_k: int) -> Tensor:
    """rows (R, D) in expert order -> (T, D): the sum of each token's rows."""
    return _Unpermute.apply(rows, order, inverse, n_real, top_k)


def reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows (R, ...) -> rows[order]; `inverse` is the inverse permutation of `order`."""
    return _Gather.apply(rows, order, inverse)


def pad_segments(tokens: Tensor, token_at: Tensor, padded_index: Tensor) -> Tensor:
    """tokens (T, ...) -> (P, ...), where segments are padded to the length of their group.

    token_at (P,) is the token at each padded index, and padded_index (T,) the padded index of each token. token_at of
    padding is some token; its gradient there is ignored.
    """
    return _Gather.apply(tokens, token_at, padded_index)


def unpad_segments(groups: list[Tensor], token_at: Tensor, padded_index: Tensor, padding: Tensor | None) -> Tensor:
    """Groups of segments, together (P, ...) -> tokens (T, ...). padding holds the indices without a token, if any."""
    return _UnpadSegments.apply(token_at, padded_index, padding, *groups)


def _by_choice(rows: Tensor, inverse: Tensor, n_real: Tensor, top_k: int) -> Tensor:
    """rows (R, D) in expert order -> (T, K, D), zero for padding."""
    chosen = rows.index_select(0, inverse)
    padding = (inverse >= n_real)[:, None]
    if torch.compiler.is_compiling():  # one kernel gathers and masks
        chosen = chosen.masked_fill(padding, 0)
    else:  # masking in place saves a copy
        chosen = chosen.masked_fill_(padding, 0)
    return chosen.unflatten(0, (-1, top_k))


def _sum_choices(x: Tensor) -> Tensor:
    """(T, K, D) -> (T, D)."""
    return x.squeeze(1) if x.shape[1] == 1 else x.sum(1)


def _token_of(order: Tensor, top_k: int) -> Tensor:
    """order (R,) of choices -> the token (R,) of each row."""
    return order if top_k == 1 else order // top_k


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, scores: Tensor, order: Tensor, inverse: Tensor, n_real: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, scores, inverse, n_real)
        rows = tokens.index_select(0, _token_of(order, scores.shape[1]))
        return rows * scores.flatten().index_select(0, order)[:, None].to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        tokens, scores, inverse, n_real = ctx.saved_tensors
        chosen = _by_choice(grad, inverse, n_real, scores.shape[1])
        grad_tokens = _sum_choices(chosen * scores[..., None].to(grad.dtype))
        grad_scores = (chosen * tokens[:, None]).sum(-1).to(scores.dtype)
        return grad_tokens, grad_scores, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, n_real: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _sum_choices(_by_choice(rows, inverse, n_real, top_k))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, _token_of(order, ctx.top_k)), None, None, None, None


class _Gather(torch.autograd.Function):
    """rows (R, ...) -> rows[order]. The gradient is a gather by the inverse, since each real row is in it once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _UnpadSegments(torch.autograd.Function):
    """The results at indices of padding are dropped, and their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, token_at: Tensor, padded_index: Tensor, padding: Tensor | None, *groups: Tensor) -> Tensor:
        ctx.save_for_backward(token_at, padding)
        ctx.sizes = [len(group) for group in groups]
        return torch.cat(groups).index_select(0, padded_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token_at, padding = ctx.saved_tensors
        padded = grad.index_select(0, token_at)
        if padding is not None:
            padded.index_fill_(0, padding, 0)
        return None, None, None, *padded.split(ctx.sizes)
