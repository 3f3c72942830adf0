"""Hidden states -> loss, without ever holding the logits of all tokens.

The head's product, the cross-entropy and its gradient go by in chunks of tokens: the gradient of a chunk is made
while its logits are at hand, so they are computed once and forgotten (the idea of Liger's and Apple's fused losses).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the target of a place that does not count
CHUNK_LOGITS = 1 << 22  # logits held at a time, unless that is fewer than CHUNK_TOKENS rows
CHUNK_TOKENS = 256

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (T, D), weight (V, D), targets (T,) -> their summed loss


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats; IGNORE counts nothing.

    hidden (T, D), weight (V, D) of the same dtype, targets (T,) -> fp32 scalar (fp64 for fp64).
    """
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, wants_grad)


def liger_cross_entropy() -> Loss:
    """The same loss by the Triton kernels of Liger (arXiv:2410.10989): on CUDA, or on a CPU with TRITON_INTERPRET=1.

    Its import brings triton and takes seconds, so it happens here. Raises ImportError without liger-kernel.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)
    return lambda hidden, weight, targets: fused(weight, hidden, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, wants_grad: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_grad else None
        rows = max(CHUNK_TOKENS, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            logits = (h @ weight.t()).to(wide)
            real, chosen = (t != IGNORE)[:, None], t.clamp(min=0)[:, None]
            if grad_hidden is None or grad_weight is None:
                loss -= (torch.log_softmax(logits, dim=-1).gather(1, chosen) * real).sum()
                continue
            p = torch.softmax(logits, dim=-1)
            # log p of the likeliest word is known well, however unlikely the target is: one exponential for each logit
            below = logits.amax(-1, keepdim=True) - logits.gather(1, chosen)
            loss += ((below - p.amax(-1, keepdim=True).log()) * real).sum()
            p.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=wide))
            d, h = p.to(h.dtype), h * real  # what does not count is left out where rows are short
            torch.mm(d, weight, out=grad_hidden[start : start + rows])
            grad_hidden[start : start + rows] *= real
            if d.dtype == wide:
                grad_weight.addmm_(d.t(), h)
            else:
                grad_weight += d.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad.to(grad_weight.dtype)
        return (grad_hidden * scale).to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), None, None


def full_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (..., D), weight (V, D) -> logits (..., V) in fp32 (fp64 for fp64)."""
    return F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
