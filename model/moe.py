"""Mixture of experts: the router picks, rows are sorted by expert (`permute.py`), a grouped product computes.

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
from model.permute import permute, sort_choices, unpermute
from model.precision import cast, copies_are_kept
from model.random import NOISE, normal


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
        return self.activate(F.linear(x, cast(self.gate_up, x.dtype)))

    def activate(self, x: Tensor) -> Tensor:
        """x (..., 2F) -> (..., F)."""
        return swiglu(x)

    def narrow(self, hidden: Tensor) -> Tensor:
        """hidden (..., F) -> (..., D)."""
        return F.linear(hidden, cast(self.down, hidden.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.narrow(self.widen(x))


class Routing(NamedTuple):
    """What the router decided."""

    scores: Tensor  # (T, K) fp32
    experts: Tensor  # (T, K); E, whom nobody owns, for tokens that are not real
    loads: Tensor  # (E,) int64: real tokens sent to each expert
    logits: Tensor  # (T, E) fp32, for `router_statistics`; without a gradient unless the model penalizes them


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

    def forward(self, x: Tensor, real: Tensor, noise: Tensor | None) -> Routing:
        """x (T, D), real (T,) bool, noise (T, E) standard normal -> Routing.

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
        return Routing(scores, experts, loads[:n_experts], logits if self.penalized else logits.detach())


def router_statistics(logits: Tensor, real: Tensor, shares: Tensor | None) -> Tensor:
    """logits (layers, T, E), real (T,) bool, shares (layers, E) of the global batch's load -> (layers, 3).

    Sums over real tokens of: the entropy of the normalized scores p; the z-loss (logsumexp of the logits)^2
    (arXiv:2202.08906, equation 5); the auxiliary loss E sum_e f_e p_e (arXiv:2101.03961, equation 4, f the load shares
    of the global batch), which is 1 when all experts are alike, and 0 without shares.
    """
    log_p = F.logsigmoid(logits)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)  # in logarithms: no epsilon, and no 0 / 0
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1).detach()
    z = logits.logsumexp(-1).square()
    aux = torch.zeros_like(z) if shares is None else (p @ shares[..., None].to(p)).squeeze(-1) * p.shape[-1]
    return torch.stack([entropy, z, aux], dim=1).masked_fill(~real, 0).sum(-1)


class Experts(nn.Module):
    """The routed experts' SwiGLU, all at once: weights (E, D, 2F) and (E, F, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, dim, hidden = config.n_experts, config.dim, config.expert_dim
        self.gate_up = nn.Parameter(torch.empty(n, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(n, hidden, dim))

    def forward(self, rows: Tensor, counts: Tensor, sizes: list[int] | None = None) -> Tensor:
        """rows (R, D) in the order of their experts, counts (E,) -> (R, D); see `grouped_product`.

        sizes are the counts as the host knows them, if it does. Where no grouped kernel takes the rows and it does not,
        this waits for the device, once.
        """
        if sizes is None and not can_group(rows.dtype, rows.device, self.gate_up.shape, self.down.shape):
            sizes = counts.tolist()
        return self.swiglu(rows, counts, sizes)

    def swiglu(self, rows: Tensor, counts: Tensor, sizes: list[int] | None) -> Tensor:
        hidden = self.activate(grouped_product(rows, self.gate_up, counts, sizes))
        return grouped_product(hidden, self.down, counts, sizes)

    def activate(self, x: Tensor) -> Tensor:
        """x (R, 2F) -> (R, F)."""
        return swiglu(x)

    def decode(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """rows (R, D) in any order, chosen (R,) the expert of each or E for none -> (R, D): for few rows, no gradient.

        It waits for the device.
        """
        experts = chosen.tolist()
        return each_product(swiglu(each_product(rows, self.gate_up, experts)), self.down, experts)


def each_product(rows: Tensor, weight: Tensor, chosen: list[int]) -> Tensor:
    """rows (R, K) each with its own of weight (G, K, N) -> (R, N), 0 where that is G: no other is visited or cast."""
    nobody, weight = rows.new_zeros(1, weight.shape[2]), cast(weight, rows.dtype) if copies_are_kept() else weight
    pairs = zip(rows.split(1), chosen, strict=True)
    return torch.cat([row @ weight[i].to(row.dtype) if i < len(weight) else nobody for row, i in pairs])


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor, sizes: list[int] | None = None) -> Tensor:
    """rows (R, K) in the order of their groups, weight (G, K, N), counts (G,), sizes the same on the host -> (R, N).

    Rows beyond the sum of counts are padding: what comes out for them is undefined, and costs nothing. Without sizes it
    waits for the device where there is no grouped kernel.
    """
    weight = cast(weight, rows.dtype)
    if can_group(rows.dtype, rows.device, weight.shape):
        offsets = counts.cumsum(0).to(torch.int32)
        return _GroupedProduct.apply(rows, weight, offsets)
    sizes = counts.tolist() if sizes is None else sizes
    padding = rows.shape[0] - sum(sizes)
    parts = [part @ w for part, w in zip(rows.split([*sizes, padding]), weight.unbind(0), strict=False)]
    return torch.cat([*parts, rows.new_zeros(padding, weight.shape[2])])


def can_group(dtype: torch.dtype, device: torch.device, *shapes: torch.Size) -> bool:
    """Whether `grouped_mm` has a kernel for weights of these shapes; it wants rows of whole 16 bytes."""
    if dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    if device.type == "cuda" and not has_grouped_kernel(dtype, torch.cuda.get_device_capability(device)):
        return False
    return all(size * dtype.itemsize % 16 == 0 for shape in shapes for size in shape[1:])


def has_grouped_kernel(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a CUDA device of this capability has a kernel: bf16 on Hopper and on Blackwell's sm_10x.

    Elsewhere `grouped_mm` copies the offsets to the host in each call, and loops.
    """
    return dtype == torch.bfloat16 and capability[0] in (9, 10)


def leaves_idle_gradients(capability: tuple[int, int]) -> bool:
    """Whether the weight gradient of an empty group may be what lay in memory, as with CUTLASS before 4.3 on sm_100
    (NVIDIA/cutlass#2674, pytorch/pytorch#172439).
    """
    return capability[0] == 10


def clear_idle(gradient: Tensor, offsets: Tensor) -> None:
    """Zero the gradient (G, K, N) of empty groups, whose rows end at offsets (G,)."""
    idle = offsets.diff(prepend=offsets.new_zeros(1)) == 0
    gradient.masked_fill_(idle[:, None, None], 0)


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
        if to_weight is not None and grad.is_cuda and leaves_idle_gradients(torch.cuda.get_device_capability()):
            clear_idle(to_weight, offsets)
        return to_rows, to_weight, None


class Trip(Protocol):
    """The way of a layer's rows to their experts and back: what the seam `MoE.exchange` begins."""

    def arrive(self) -> tuple[Tensor, Tensor, list[int] | None]:
        """Rows for the experts of this process, in their order, and how many for each, also as the host knows it."""

    def send_back(self, rows: Tensor) -> None:
        """Take what the experts made of them."""

    def home(self) -> Tensor:
        """It, in the order in which the rows were sent."""


class Stay:
    """The trip of rows whose experts all live here."""

    def __init__(self, rows: Tensor, loads: Tensor) -> None:
        self.rows, self.loads = rows, loads

    def arrive(self) -> tuple[Tensor, Tensor, None]:
        return self.rows, self.loads, None

    def send_back(self, rows: Tensor) -> None:
        self.rows = rows

    def home(self) -> Tensor:
        return self.rows


class Dispatch(NamedTuple):
    """Rows for the experts, and what brings them back into the order of tokens."""

    rows: Tensor  # (T K, D) in the order of experts, times their scores; padding last
    order: Tensor  # (T K,), see `permute`
    inverse: Tensor  # (T K,)
    real: Tensor  # (), the number of rows that are not padding
    loads: Tensor  # (E,)
    logits: Tensor  # (T, E)


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

    def forward(self, x: Tensor, real: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D), real (B, S) bool -> (B, S, D), loads (E,), logits (T, E) of `Routing`.

        keys (SITES, B) make the router's noise.
        """
        tokens = x.flatten(0, 1)  # (T, D)
        few = len(tokens) * self.router.top_k < len(self.router.bias) and not torch.is_grad_enabled()
        if few and self.exchange is Stay and keys is None:  # a step of generation
            return self.decode(x, real)
        sent = self.dispatch(x, real, keys)
        trip = self.exchange(sent.rows, sent.loads)
        hidden = None if self.shared is None else self.shared.widen(tokens)
        trip.send_back(self.experts(*trip.arrive()))
        shared = None if self.shared is None or hidden is None else self.shared.narrow(hidden)
        out = self.combine(trip.home(), shared, sent.order, sent.inverse, sent.real)
        return out.view_as(x), sent.loads, sent.logits

    def decode(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for fewer rows than experts and no gradient: nothing is sorted, only the chosen experts work."""
        tokens = x.flatten(0, 1)
        scores, experts, loads, logits = self.router(tokens, real.flatten(), None)
        rows = tokens[:, None] * scores[..., None].to(x.dtype)  # (T, K, D)
        out = self.experts.decode(rows.flatten(0, 1), experts.flatten()).view_as(rows).sum(1)
        if self.shared is not None:
            out = self.shared.narrow(self.shared.widen(tokens)) + out
        return out.view_as(x), loads, logits

    def dispatch(self, x: Tensor, real: Tensor, keys: Tensor | None) -> Dispatch:
        """Route the tokens and lay out a row for each choice."""
        tokens, noise = x.flatten(0, 1), None
        if keys is not None and self.training and self.router.noise is not None:
            noise = normal(keys[NOISE], x.shape[1] * len(self.router.bias)).view(len(tokens), -1)
        scores, experts, loads, logits = self.router(tokens, real.flatten(), noise)
        order, inverse = sort_choices(experts, len(loads))
        count = loads.sum()  # stays on the device: nobody waits for it
        rows = self.permute(tokens, scores, order, inverse, count)
        return Dispatch(rows, order, inverse, count, loads, logits)

    def permute(self, tokens: Tensor, scores: Tensor, order: Tensor, inverse: Tensor, count: Tensor) -> Tensor:
        return permute(tokens, scores, order, inverse, count)

    def combine(self, rows: Tensor, shared: Tensor | None, order: Tensor, inverse: Tensor, count: Tensor) -> Tensor:
        """rows (T K, D) from the experts, shared (T, D) from the shared expert -> their sums (T, D)."""
        routed = unpermute(rows, order, inverse, count, self.router.top_k)
        return routed if shared is None else shared + routed
