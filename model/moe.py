"""Mixture of experts: the router picks, rows are sorted by expert, a grouped product computes, rows go home.

As in Llama 4 a token's score is the sigmoid of its logit and multiplies the expert's *input*. Balancing is free of an
auxiliary loss (arXiv:2408.15664): a bias per expert takes part in the choice only, and is moved by the trainer.
Loads (tokens per expert) are an output of the forward, so that recomputation and evaluation cannot count twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): the dense block's, and the shared expert's."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        gate, up = F.linear(x, self.gate_up.to(x.dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down.to(x.dtype))


class Router(nn.Module):
    """Scores the experts in fp32, whatever the dtype of x, and picks top_k of them."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.register_buffer("bias", torch.zeros(config.n_experts))

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, D), real (T,) bool -> scores (T, K), experts (T, K), loads (E,) int64.

        Tokens that are not real get the expert id E, which nobody owns, and count in no load.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))  # (T, E)
        experts = torch.topk(logits.detach().sigmoid() + self.bias, self.top_k, dim=-1).indices
        scores = logits.gather(1, experts).sigmoid()
        n_experts = self.weight.shape[0]
        experts = experts.masked_fill(~real[:, None], n_experts)
        loads = torch.zeros(n_experts + 1, dtype=torch.int64, device=x.device)  # bincount would wait for the device
        loads.scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))
        return scores, experts, loads[:n_experts]


class Experts(nn.Module):
    """The routed experts' SwiGLU, all at once: weights (E, D, 2F) and (E, F, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, dim, hidden = config.n_experts, config.dim, config.expert_dim
        self.gate_up = nn.Parameter(torch.empty(n, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(n, hidden, dim))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (R, D) in the order of their experts, counts (E,) -> (R, D); see `grouped_product`."""
        gate, up = grouped_product(rows, self.gate_up, counts).chunk(2, dim=-1)
        return grouped_product(F.silu(gate) * up, self.down, counts)


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows (R, K) in the order of their groups, weight (G, K, N), counts (G,) -> (R, N).

    Rows beyond the sum of counts are nobody's: what comes out for them is undefined, and costs nothing.
    """
    weight = weight.to(rows.dtype)
    if can_group(rows.dtype, rows.device, weight.shape):
        offsets = counts.cumsum(0).to(torch.int32)
        return _ContiguousGradient.apply(F.grouped_mm(rows.contiguous(), weight, offs=offsets))
    sizes = counts.tolist()
    nobodys = rows.shape[0] - sum(sizes)
    parts = [part @ w for part, w in zip(rows.split([*sizes, nobodys]), weight.unbind(0), strict=False)]
    return torch.cat([*parts, rows.new_zeros(nobodys, weight.shape[2])])


def can_group(dtype: torch.dtype, device: torch.device, shape: torch.Size) -> bool:
    """Whether `grouped_mm` takes these weights: it wants fp32 or bf16, rows of whole 16 bytes, and sm80 on CUDA."""
    if dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    if device.type == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0)):
        return False
    return all(size * dtype.itemsize % 16 == 0 for size in shape[1:])


class _ContiguousGradient(torch.autograd.Function):
    """Identity; grouped_mm refuses gradients that broadcast, such as those of a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous() if grad.numel() else grad.new_empty(grad.shape)  # strides of empty ones count too


class _Send(torch.autograd.Function):
    """tokens (T, D) -> a row for each choice, in the order of experts; nothing comes back for rows that are nobody's.

    The gradient is a gather by the inverse order, as everywhere here: nothing is added into shared rows, so it is
    exact, and deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, count: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse, count)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = _home(grad, *ctx.saved_tensors)
        return (grad if ctx.top_k == 1 else grad.unflatten(0, (-1, ctx.top_k)).sum(1)), None, None, None, None


class _Return(torch.autograd.Function):
    """Rows in the order of experts -> (T K, D) in the order of choices, zero for choices that nobody served."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return _home(rows, inverse, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None, None


def _home(rows: Tensor, inverse: Tensor, count: Tensor) -> Tensor:
    return rows.index_select(0, inverse).masked_fill_((inverse >= count)[:, None], 0)


class MoE(nn.Module):
    """Router, routed experts and the shared expert.

    `exchange` is the seam: None runs all experts here; else an object that is called like `self.experts`
    and may send the rows to other processes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = FeedForward(config.dim, config.expert_dim) if config.shared_expert else None
        self.exchange: Any = None

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, D), real (B, S) bool -> (B, S, D), loads (E,)."""
        tokens = x.flatten(0, 1)  # (T, D)
        scores, experts, loads = self.router(tokens, real.flatten())
        top_k, count = experts.shape[1], loads.sum()  # the count stays on the device: nobody waits for it
        order = torch.argsort(experts.flatten(), stable=True)  # choices by expert, those of no expert last
        inverse = torch.argsort(order)  # where each choice went
        sent = _Send.apply(tokens, order, inverse, count, top_k)
        sent = sent * _Send.apply(scores.view(-1, 1), order, inverse, count, 1).to(x.dtype)
        done = (self.exchange or self.experts)(sent, loads)
        home = _Return.apply(done, order, inverse, count)  # (T K, D)
        out = home if top_k == 1 else home.unflatten(0, (-1, top_k)).sum(1)
        if self.shared is not None:
            out = out + self.shared(tokens)
        return out.view_as(x), loads
