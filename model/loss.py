"""Hidden states -> cross-entropy, without ever holding the logits of all tokens.

The head's matrix multiplication, the cross-entropy and its gradient are computed for one chunk of tokens after the
other. The gradient of a chunk is computed in the forward, while its logits exist, so that logits are computed once and
then freed (the idea of the fused losses of Liger and of Apple).

Letters: T tokens, C tokens of a chunk, D dim, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the target of a token that adds nothing to the loss
# Logits of a chunk, unless they belong to fewer than CHUNK_TOKENS tokens. They fit the cache of a CPU, or occupy a
# whole GPU.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
CHUNK_TOKENS = 256

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (T, D), weight (V, D), targets (T,) -> their summed loss
ChunkGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see `chunk_gradient`


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradient: ChunkGradient | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats; a target of IGNORE adds nothing.

    hidden (T, D), weight (V, D) of the same dtype, targets (T,) -> fp32 scalar (fp64 for fp64). `gradient` replaces
    `chunk_gradient`, for example by a compiled version of it.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        gradient = None
    elif gradient is None:
        gradient = chunk_gradient
    return _LinearCrossEntropy.apply(hidden, weight, targets, gradient)


def tokens_per_chunk(tokens: int, vocab_size: int, device: torch.device) -> int:
    """Tokens of each chunk of logits. On CUDA chunks are as even as possible, because each new shape is compiled."""
    largest = max(CHUNK_TOKENS, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cpu"]) // vocab_size)
    if device.type == "cpu":
        return largest
    chunks = -(-tokens // largest)
    return max(1, -(-tokens // chunks))


def liger_cross_entropy() -> Loss:
    """The same loss by the Triton kernels of Liger (arXiv:2410.10989): on CUDA, or on a CPU with TRITON_INTERPRET=1.

    Liger is imported here and not above, because it imports triton, which takes seconds. Raises ImportError without
    liger-kernel.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)
    return lambda hidden, weight, targets: fused(weight, hidden, targets)


def chunk_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (C, V), targets (C,) -> the summed loss, and softmax(logits) - one_hot(target) in the dtype of logits.

    Tokens whose target is IGNORE add nothing to the loss, and their gradient is undefined.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_counted = (targets != IGNORE)[:, None]
    chosen = targets.clamp(min=0)[:, None]
    if torch.compiler.is_compiling():  # one kernel, which reads the logits twice and writes the gradient once
        log_total = wide.logsumexp(-1, keepdim=True)
        one_hot = torch.arange(logits.shape[1], device=logits.device) == chosen
        gradient = (wide - log_total).exp() - one_hot.to(wide.dtype)
        loss = ((log_total - wide.gather(1, chosen)) * is_counted).sum()
        return loss, gradient.to(logits.dtype)
    p = torch.softmax(wide, dim=-1)
    # log p[target] = log p[best] - (logit[best] - logit[target]). The log of the largest p is accurate however unlikely
    # the target is, and no second exponential of each logit is needed.
    below_best = wide.amax(-1, keepdim=True) - wide.gather(1, chosen)
    loss = ((below_best - p.amax(-1, keepdim=True).log()) * is_counted).sum()
    p.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=wide.dtype))
    return loss, p.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, gradient: ChunkGradient | None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        if gradient is not None:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        size = tokens_per_chunk(len(hidden), len(weight), hidden.device)
        for start in range(0, hidden.shape[0], size):
            h, t = hidden[start : start + size], targets[start : start + size]
            if gradient is None:
                log_p = torch.log_softmax((h @ weight.t()).to(wide), dim=-1).gather(1, t.clamp(min=0)[:, None])
                loss -= (log_p * (t != IGNORE)[:, None]).sum()
            else:
                loss += _chunk(h, weight, t, gradient, grad_hidden[start : start + size], grad_weight)
        if gradient is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # Scaled in place, because the gradient of the weight is as large as the head. This can happen only once: in a
        # second backward through the same graph autograd finds that saved tensors were written to, and raises an error.
        grad_hidden, grad_weight = ctx.saved_tensors
        # As a tensor of one dimension the factor keeps its dtype; a scalar would be rounded to that of grad_hidden.
        scale = grad.to(grad_weight.dtype).view(1)
        return grad_hidden.mul_(scale), grad_weight.mul_(scale).to(ctx.weight_dtype), None, None


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradient: ChunkGradient, grad_hidden: Tensor, grad_weight: Tensor
) -> Tensor:
    """The loss of a chunk (C, D). Writes the gradient to grad_hidden (C, D), and adds to grad_weight (V, D).

    The logits and their gradient are freed before those of the next chunk are computed.
    """
    loss, grad_logits = gradient(hidden @ weight.t(), targets)
    # Tokens whose target is IGNORE are masked in hidden states of D numbers, which are fewer than the V logits.
    is_counted = (targets != IGNORE)[:, None]
    torch.mm(grad_logits, weight, out=grad_hidden)
    grad_hidden *= is_counted
    _add_matmul(grad_weight, grad_logits.t(), hidden * is_counted)
    return loss


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. The dtype of total may be wider than that of a and b: CUDA adds to it without rounding first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def full_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (..., D), weight (V, D) -> logits (..., V) in fp32 (fp64 for fp64)."""
    return F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
