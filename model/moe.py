"""Mixture of experts: the router picks, rows are sorted by expert, a grouped product computes, rows go home.

As in Llama 4 a token's score is the sigmoid of its logit and multiplies the expert's *input*. Balancing is free of an
auxiliary loss (arXiv:2408.15664): a bias per expert takes part in the choice only, and is moved by the trainer.
Loads (tokens per expert) are an output of the forward, so that recomputation and evaluation cannot count twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.random import fold, normal

NOISE = 3  # the router's site among the random numbers of a layer; 0 to 2 are dropout's


def swiglu(x: Tensor) -> Tensor:
    """x (..., 2F), gate and up -> silu(gate) * up (..., F), arXiv:2002.05202. Keeps x alone for the backward."""
    if torch.compiler.is_compiling():  # which makes one kernel of it, and decides itself what to keep
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(x) if torch.is_grad_enabled() else _swiglu(x)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        to_gate, to_up = out.chunk(2, dim=-1)  # written in place: no copy joins them
        torch.mul(F.silu(gate), grad, out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return out


class FeedForward(nn.Module):
    """The dense block's, and the shared expert's: SwiGLU, in two halves."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(dim, hidden))

    def widen(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., F)."""
        return swiglu(F.linear(x, self.gate_up.to(x.dtype)))

    def narrow(self, hidden: Tensor) -> Tensor:
        """hidden (..., F) -> (..., D)."""
        return F.linear(hidden, self.down.to(hidden.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.narrow(self.widen(x))


class Routing(NamedTuple):
    """What the router decided."""

    scores: Tensor  # (T, K) fp32
    experts: Tensor  # (T, K); E, whom nobody owns, for tokens that are not real
    loads: Tensor  # (E,) int64: real tokens sent to each expert
    statistics: Tensor  # (3,) sums over real tokens, zero outside of training: entropy, z-loss, auxiliary loss


class Router(nn.Module):
    """Scores the experts in fp32, whatever the dtype of x, and picks top_k of them."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.noise = nn.Parameter(torch.empty(config.n_experts, config.dim)) if config.noisy_top_k else None
        self.penalized = config.aux_loss_weight > 0 or config.z_loss_weight > 0
        self.register_buffer("bias", torch.zeros(config.n_experts))

    def forward(self, x: Tensor, real: Tensor, noise: Tensor | None, shares: Tensor | None) -> Routing:
        """x (T, D), real (T,) bool, noise (T, E) standard normal, shares (E,) of the global batch's load -> Routing.

        With noise the logits are those of noisy top-k gating (arXiv:1701.06538, equation 4).
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        logits = F.linear(x, self.weight.to(wide))  # (T, E)
        if noise is not None and self.noise is not None:
            logits = logits + noise.to(wide) * F.softplus(F.linear(x, self.noise.to(wide)))
        # sigmoid(x) - 1 in the place of sigmoid(x), which is 1 for every logit above 17, as if they were alike
        experts = torch.topk(self.bias - (-logits.detach()).sigmoid(), self.top_k, dim=-1).indices
        scores = logits.gather(1, experts).sigmoid()
        n_experts = self.weight.shape[0]
        experts = experts.masked_fill(~real[:, None], n_experts)
        loads = torch.zeros(n_experts + 1, dtype=torch.int64, device=x.device)  # bincount would wait for the device
        loads.scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))
        return Routing(scores, experts, loads[:n_experts], self._statistics(logits, real, shares))

    def _statistics(self, logits: Tensor, real: Tensor, shares: Tensor | None) -> Tensor:
        """Per token, summed: the entropy of the normalized scores p; the z-loss (logsumexp of the logits)^2
        (arXiv:2202.08906, equation 5); the auxiliary loss E sum_e f_e p_e (arXiv:2101.03961, equation 4, f the load
        shares of the global batch), which is 1 when all experts are alike.
        """
        if not self.training:
            return logits.new_zeros(3)
        with torch.set_grad_enabled(self.penalized and torch.is_grad_enabled()):
            log_p = F.logsigmoid(logits)
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)  # in logarithms: no epsilon, and no 0 / 0
            p = log_p.exp()
            entropy = -(p * log_p).sum(-1).detach()
            z = logits.logsumexp(-1).square()
            aux = torch.zeros_like(z) if shares is None else (p @ shares.to(p)) * p.shape[1]
            return torch.stack([entropy, z, aux]).masked_fill(~real, 0).sum(1)


class Experts(nn.Module):
    """The routed experts' SwiGLU, all at once: weights (E, D, 2F) and (E, F, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, dim, hidden = config.n_experts, config.dim, config.expert_dim
        self.gate_up = nn.Parameter(torch.empty(n, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(n, hidden, dim))

    def forward(self, rows: Tensor, counts: Tensor, chosen: Tensor | None = None) -> Tensor:
        """rows (R, D) in the order of their experts, counts (E,) -> (R, D); see `grouped_product`.

        With chosen (R,), the expert of each row or E for none, rows are in any order: for few rows and no gradient.
        Then it waits for the device.
        """
        if chosen is None:
            return self.swiglu(rows, counts)
        experts = chosen.tolist()
        return each_product(swiglu(each_product(rows, self.gate_up, experts)), self.down, experts)

    def swiglu(self, rows: Tensor, counts: Tensor) -> Tensor:
        return grouped_product(swiglu(grouped_product(rows, self.gate_up, counts)), self.down, counts)


def each_product(rows: Tensor, weight: Tensor, chosen: list[int]) -> Tensor:
    """rows (R, K) each with its own of weight (G, K, N) -> (R, N), 0 where that is G: no other is visited or cast."""
    nobody = rows.new_zeros(1, weight.shape[2])
    pairs = zip(rows.split(1), chosen, strict=True)
    return torch.cat([row @ weight[i].to(row.dtype) if i < len(weight) else nobody for row, i in pairs])


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows (R, K) in the order of their groups, weight (G, K, N), counts (G,) -> (R, N).

    Rows beyond the sum of counts are nobody's: what comes out for them is undefined, and costs nothing.
    """
    weight = weight.to(rows.dtype)
    if can_group(rows.dtype, rows.device, weight.shape):
        offsets = counts.cumsum(0).to(torch.int32)
        return _GroupedProduct.apply(rows, weight, offsets)
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


class _GroupedProduct(torch.autograd.Function):
    """grouped_mm, whose own backward refuses gradients that broadcast, such as those of a sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, offsets)
        return F.grouped_mm(rows, weight, offs=offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous() if grad.numel() else grad.new_empty(grad.shape)  # strides of empty ones count too
        to_rows = F.grouped_mm(grad, weight.transpose(1, 2), offs=offsets) if ctx.needs_input_grad[0] else None
        to_weight = F.grouped_mm(rows.t(), grad, offs=offsets) if ctx.needs_input_grad[1] else None
        return to_rows, to_weight, None


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


class Trip(Protocol):
    """The way of a layer's rows to their experts and back: what the seam `MoE.exchange` begins."""

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Rows for the experts of this process, in their order, and how many for each."""

    def send_back(self, rows: Tensor) -> None:
        """Take what the experts made of them."""

    def home(self) -> Tensor:
        """It, in the order in which the rows were sent."""


class Stay:
    """The trip of rows whose experts all live here."""

    def __init__(self, rows: Tensor, loads: Tensor) -> None:
        self.rows, self.loads = rows, loads

    def arrive(self) -> tuple[Tensor, Tensor]:
        return self.rows, self.loads

    def send_back(self, rows: Tensor) -> None:
        self.rows = rows

    def home(self) -> Tensor:
        return self.rows


class Dispatch(NamedTuple):
    """Rows for the experts, and what brings them home."""

    rows: Tensor  # (T K, D) in the order of experts, times their scores; those of no expert last
    order: Tensor  # (T K,) the choice that each row is of
    inverse: Tensor  # (T K,) the row of each choice
    loads: Tensor  # (E,)
    statistics: Tensor  # (3,)


class MoE(nn.Module):
    """Router, routed experts and the shared expert, which works while rows are on their way.

    `exchange` is the seam: called with rows in the order of experts and loads (E,), it begins their `Trip`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = FeedForward(config.dim, config.expert_dim) if config.shared_expert else None
        self.exchange: Callable[[Tensor, Tensor], Trip] = Stay

    def forward(
        self, x: Tensor, real: Tensor, keys: Tensor | None = None, shares: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D), real (B, S) bool -> (B, S, D), loads (E,), statistics (3,) of `Routing`.

        keys (B,) make the router's noise; shares (E,) are the load shares that the auxiliary loss takes.
        """
        tokens = x.flatten(0, 1)  # (T, D)
        few = len(tokens) * self.router.top_k < len(self.router.bias) and not torch.is_grad_enabled()
        if few and self.exchange is Stay and keys is None:  # a step of generation
            return self._few(x, real, shares)
        sent = self.dispatch(x, real, keys, shares)
        trip = self.exchange(sent.rows, sent.loads)
        hidden = None if self.shared is None else self.shared.widen(tokens)
        trip.send_back(self.experts(*trip.arrive()))
        out = None if self.shared is None or hidden is None else self.shared.narrow(hidden)
        home = _Return.apply(trip.home(), sent.order, sent.inverse, sent.loads.sum())  # (T K, D)
        home = home.unflatten(0, (-1, self.router.top_k)).sum(1) if self.router.top_k > 1 else home
        out = home if out is None else out + home
        return out.view_as(x), sent.loads, sent.statistics

    def _few(self, x: Tensor, real: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same for fewer rows than experts and no gradient: nothing is sorted, only the chosen experts work."""
        tokens = x.flatten(0, 1)
        scores, experts, loads, statistics = self.router(tokens, real.flatten(), None, shares)
        rows = tokens[:, None] * scores[..., None].to(x.dtype)  # (T, K, D)
        out = self.experts(rows.flatten(0, 1), loads, experts.flatten()).view_as(rows).sum(1)
        if self.shared is not None:
            out = self.shared.narrow(self.shared.widen(tokens)) + out
        return out.view_as(x), loads, statistics

    def dispatch(self, x: Tensor, real: Tensor, keys: Tensor | None, shares: Tensor | None) -> Dispatch:
        """Route the tokens and lay out a row for each choice."""
        tokens, noise = x.flatten(0, 1), None
        if keys is not None and self.training and self.router.noise is not None:
            noise = normal(fold(keys, NOISE), x.shape[1] * len(self.router.bias)).view(len(tokens), -1)
        scores, experts, loads, statistics = self.router(tokens, real.flatten(), noise, shares)
        top_k, count = experts.shape[1], loads.sum()  # the count stays on the device: nobody waits for it
        order = torch.argsort(experts.flatten(), stable=True)  # choices by expert, those of no expert last
        inverse = torch.argsort(order)  # where each choice went
        rows = _Send.apply(tokens, order, inverse, count, top_k)
        rows = rows * _Send.apply(scores.view(-1, 1), order, inverse, count, 1).to(x.dtype)
        return Dispatch(rows, order, inverse, loads, statistics)
