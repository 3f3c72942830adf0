"""Mixture of experts (MoE): a router picks K experts for each token, and each expert processes its rows.

One layer, step by step:

    router      tokens (T, D) -> scores and experts (T, K), and the load of each expert (E,)
    permute     one row per (token, chosen expert), multiplied by that choice's score -> rows (R, D) with R = T K,
                sorted by expert
    dispatch    rows -> the processes that hold their experts
    experts     feed-forwards, as grouped matrix multiplications with one matrix for each expert
    combine     the experts' outputs -> the processes that sent the rows
    unpermute   the sum of each token's outputs, and of the shared expert's -> (T, D)

In this module a *row* is the copy of a token that is routed to one expert. The *load* of an expert is the number of
real rows routed to it: those of real tokens (see `context.py`). Other rows are padding, which no expert processes.

Dispatch and combine are the interface `Exchange` (`exchange.py`). In this package all experts are on one process;
`parallel/experts.py` spreads them over many. The shared expert runs while rows are in flight: its first half during
dispatch, its second half during combine.

As in Llama 4, the score of a choice is the sigmoid of its logit, and multiplies the expert's *input*. Experts are
balanced without an auxiliary loss (arXiv:2408.15664): a bias for each expert is added when experts are picked, and
nowhere else. The trainer adjusts it in each step; from `balance_until` on it fades to zero. Loads are an output of the
forward, so that neither recomputation nor evaluation counts them again.

Letters: B batch, S sequence, T = B*S tokens, D dim, F hidden, E experts, K top-k, R rows (in `Experts`:
those that this process received).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import ForwardContext
from model.exchange import Exchange, LocalExchange
from model.feed_forward import FeedForward, swiglu
from model.grouped import can_group, grouped_matmul, per_row_matmul
from model.initial_values import residual_normal, scaled_normal
from model.parts import part
from model.permute import permute, sort_by_expert, unpermute
from model.random import NOISE, normal


class Routing(NamedTuple):
    """The decisions of a router."""

    scores: Tensor  # (T, K) fp32
    experts: Tensor  # (T, K); E, which is no expert, for tokens whose target is IGNORE, and for the padding of prompts
    loads: Tensor  # (E,) int64: the number of real rows routed to each expert
    logits: Tensor  # (T, E) fp32, for `router_statistics`; with a gradient only if the loss depends on them


class Router(nn.Module):
    """Scores the experts in fp32, whatever the dtype of the tokens, and picks top_k of them.

    A different router is a subclass that overrides `logits` or `pick`.
    """

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.has_loss = config.has_router_loss
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.noise = nn.Parameter(torch.empty(config.n_experts, config.dim)) if config.noisy_top_k else None
        self.initial_values = {"weight": scaled_normal(config.dim), "noise": scaled_normal(config.dim)}
        self.register_buffer("bias", torch.zeros(config.n_experts))

    # Recomputation keeps the choice of experts, because a GPU could decide near ties differently the second time.
    @part(recompute="full", keep=[torch.ops.aten.topk.default])
    def forward(self, x: Tensor, is_real: Tensor, noise: Tensor | None) -> Routing:
        """x (T, D), is_real (T,) bool, noise (T, E) of standard normal numbers -> Routing."""
        logits = self.logits(x, noise)
        experts, scores = self.pick(logits)
        n_experts = self.weight.shape[0]
        experts = experts.masked_fill(~is_real[:, None], n_experts)
        loads = torch.zeros(n_experts + 1, dtype=torch.int64, device=x.device)
        # torch.bincount would make the host wait for the device.
        loads.scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))
        return Routing(scores, experts, loads[:n_experts], logits if self.has_loss else logits.detach())

    def logits(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """x (T, D) -> (T, E) fp32; with noise as in noisy top-k gating (arXiv:1701.06538, equation 4)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        logits = F.linear(x, self.weight.to(wide))
        if noise is not None and self.noise is not None:
            logits = logits + noise.to(wide) * F.softplus(F.linear(x, self.noise.to(wide)))
        return logits

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (T, E) -> the top_k experts of each token, the best first, and their scores, both (T, K)."""
        # Experts are compared by -sigmoid(-x) = sigmoid(x) - 1. sigmoid(x) rounds to 1 for every logit above 17, which
        # would make such experts equal; -sigmoid(-x) does not.
        experts = torch.topk(self.bias - (-logits.detach()).sigmoid(), self.top_k, dim=-1).indices
        return experts, logits.gather(1, experts).sigmoid()


def router_statistics(logits: Tensor, is_real: Tensor, load_shares: Tensor | None) -> Tensor:
    """logits (layers, T, E), is_real (T,) bool, load_shares (layers, E) of the global batch -> (layers, 3).

    Sums over real tokens of
    - the entropy of the normalized scores p,
    - the z-loss (logsumexp of the logits)^2 (arXiv:2202.08906, equation 5),
    - the auxiliary loss E sum_e f_e p_e (arXiv:2101.03961, equation 4), where f are the load shares. It is 1 per
      token if loads and scores are uniform, and 0 without load shares.
    """
    log_p = F.logsigmoid(logits)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)  # log space needs no epsilon and avoids 0 / 0
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1).detach()
    z_loss = logits.logsumexp(-1).square()
    if load_shares is None:
        aux_loss = torch.zeros_like(z_loss)
    else:
        aux_loss = (p @ load_shares[..., None].to(p)).squeeze(-1) * p.shape[-1]
    return torch.stack([entropy, z_loss, aux_loss], dim=1).masked_fill(~is_real, 0).sum(-1)


class Experts(nn.Module):
    """The feed-forwards of all routed experts at once: weights (E, D, 2F) and (E, F, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_experts, dim, hidden = config.n_experts, config.dim, config.expert_dim
        self.gate_up = nn.Parameter(torch.empty(n_experts, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(n_experts, hidden, dim))
        self.initial_values = {
            "gate_up": scaled_normal(dim),
            "down": residual_normal(hidden, config.n_layers),
        }

    def resize(self, n_experts: int) -> None:
        """Replace the weights with uninitialized ones for another number of experts."""
        self.gate_up = nn.Parameter(self.gate_up.new_empty(n_experts, *self.gate_up.shape[1:]))
        self.down = nn.Parameter(self.down.new_empty(n_experts, *self.down.shape[1:]))

    def forward(self, rows: Tensor, counts: Tensor, host_counts: list[int] | None = None) -> Tensor:
        """rows (R, D) sorted by expert, counts (experts of this process,) of rows per expert -> (R, D).

        host_counts are the same numbers as counts, if the host knows them; see `grouped_matmul`. If they are needed
        and not given, the host waits for the device once.
        """
        if host_counts is None and not can_group(rows.dtype, rows.device, self.gate_up.shape, self.down.shape):
            host_counts = counts.tolist()
        return self.process(rows, counts, host_counts)

    @part(recompute="selective")
    def process(self, rows: Tensor, counts: Tensor, host_counts: list[int] | None) -> Tensor:
        hidden = self.activate(grouped_matmul(rows, self.gate_up, counts, host_counts))
        return grouped_matmul(hidden, self.down, counts, host_counts)

    @part(compile=True, dynamic=True)  # the number of rows that experts receive differs from step to step
    def activate(self, x: Tensor) -> Tensor:
        """The SwiGLU activation: x (R, 2F) -> (R, F)."""
        return swiglu(x)

    def decode(self, rows: Tensor, experts: Tensor) -> Tensor:
        """rows (R, D) in any order, experts (R,): the expert of each row; E means none -> (R, D).

        For few rows, and without a gradient. The host waits for the device.
        """
        experts_on_host = experts.tolist()
        hidden = swiglu(per_row_matmul(rows, self.gate_up, experts_on_host))
        return per_row_matmul(hidden, self.down, experts_on_host)


class SharedExpert(FeedForward):
    """The expert that processes every token. With recompute=full the first half is recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.project_down(self.project_up(x))

    @part(recompute="full")
    def project_up(self, x: Tensor) -> Tensor:
        """The first half: x (..., D) -> (..., F)."""
        return super().project_up(x)


class RoutedRows(NamedTuple):
    """Rows for the experts, and how to return their outputs to the order of tokens (see `permute.py`)."""

    rows: Tensor  # (R, D) in expert order, multiplied by their scores; padding last
    order: Tensor  # (R,)
    inverse: Tensor  # (R,)
    n_real: Tensor  # (): the number of rows that are not padding
    loads: Tensor  # (E,)
    logits: Tensor  # (T, E)


class MoE(nn.Module):
    """Router, routed experts and the shared expert of block `layer` (from 0)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = SharedExpert(config, config.expert_dim) if config.shared_expert else None
        self.exchange: Exchange = LocalExchange()  # `parallel` replaces it

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) -> (B, S, D), loads (E,), and the router's logits (T, E), see `Routing`."""
        tokens = x.flatten(0, 1)  # (T, D)
        if self._can_decode(len(tokens), context):
            return self.decode(x, context)
        routed = self.route(x, context)
        # Autograd runs the newest nodes first. So in the backward, too, each transfer overlaps with a half of the
        # shared expert.
        dispatching = self.exchange.dispatch(routed.rows, routed.loads)
        hidden = None if self.shared is None else self.shared.project_up(tokens)
        combining = self.exchange.combine(self.experts(*dispatching.wait()), dispatching)
        shared = None if self.shared is None or hidden is None else self.shared.project_down(hidden)
        out = self.unpermute(combining.wait(), shared, routed.order, routed.inverse, routed.n_real)
        return out.view_as(x), routed.loads, routed.logits

    def route(self, x: Tensor, context: ForwardContext) -> RoutedRows:
        """Pick the experts of the tokens x (B, S, D), and gather one row per (token, chosen expert)."""
        tokens = x.flatten(0, 1)
        routing = self.router(tokens, context.is_real.flatten(), self._noise(x, context))
        order, inverse = sort_by_expert(routing.experts, len(routing.loads))
        n_real = routing.loads.sum()  # stays on the device, so that the host does not wait
        rows = self.permute(tokens, routing.scores, order, inverse, n_real)
        return RoutedRows(rows, order, inverse, n_real, routing.loads, routing.logits)

    def _noise(self, x: Tensor, context: ForwardContext) -> Tensor | None:
        """The router's noise (T, E) for x (B, S, D), if it has any."""
        keys = context.rng_keys_of(self.layer, NOISE)
        if keys is None or not self.training or self.router.noise is None:
            return None
        batch, length = x.shape[:2]
        return normal(keys, length * len(self.router.bias)).view(batch * length, -1)

    @part(compile=True)
    def permute(self, tokens: Tensor, scores: Tensor, order: Tensor, inverse: Tensor, n_real: Tensor) -> Tensor:
        """tokens (T, D), scores (T, K) -> rows (R, D) in expert order, each multiplied by its choice's score."""
        return permute(tokens, scores, order, inverse, n_real)

    @part(compile=True)
    def unpermute(self, rows: Tensor, shared: Tensor | None, order: Tensor, inverse: Tensor, n_real: Tensor) -> Tensor:
        """rows (R, D) from the experts, shared (T, D) from the shared expert -> their sums (T, D)."""
        routed = unpermute(rows, order, inverse, n_real, self.router.top_k)
        return routed if shared is None else shared + routed

    def _can_decode(self, n_tokens: int, context: ForwardContext) -> bool:
        """Whether `decode` can replace the general path, as in a step of generation.

        That is so if there are fewer rows than experts, no gradient is computed, all experts are on this process, and
        there are no random keys, because `decode` draws no router noise.
        """
        has_few_rows = n_tokens * self.router.top_k < len(self.router.bias) and not torch.is_grad_enabled()
        return has_few_rows and isinstance(self.exchange, LocalExchange) and context.rng_keys is None

    def decode(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """The same as `forward` for few rows without a gradient: no row is sorted, and only chosen experts are read."""
        tokens = x.flatten(0, 1)
        scores, experts, loads, logits = self.router(tokens, context.is_real.flatten(), None)
        rows = tokens[:, None] * scores[..., None].to(x.dtype)  # (T, K, D)
        out = self.experts.decode(rows.flatten(0, 1), experts.flatten()).view_as(rows).sum(1)
        if self.shared is not None:
            out = self.shared(tokens) + out
        return out.view_as(x), loads, logits
