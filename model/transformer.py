"""Tokens -> loss, on one device: embedding, blocks, and a head that owns the loss.

Written as if for one process; `parallel` shards it from outside. Weights are cast to the dtype of the activations
where they are used, so the same lines run in fp32 and, with sharded and already cast weights, in bf16.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention, Places
from model.cache import KVCache, LayerCache
from model.config import ModelConfig
from model.loss import IGNORE, Loss, full_logits, linear_cross_entropy
from model.moe import FeedForward, MoE, router_statistics
from model.norm import RMSNorm
from model.precision import cast
from model.random import ATTENTION, EMBEDDING, FEED_FORWARD, Window, dropout, initial_normal


class Output(NamedTuple):
    """What a forward gives. `loss` is a sum over the targets that count; `logits` (B, S, V) when there are none."""

    loss: Tensor | None
    logits: Tensor | None
    loads: Tensor  # (MoE layers, E) int64: real tokens sent to each expert
    penalty: Tensor  # what the routers' auxiliary and z-loss add to the loss, a sum like it
    statistics: Tensor  # (MoE layers, 3), see `moe.router_statistics`; zero outside of training


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts or feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MoE(config) if config.is_moe(layer) else FeedForward(config.dim, config.ffn_dim)

    def forward(
        self, x: Tensor, places: Places, real: Tensor, keys: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x (B, S, D), keys (SITES, B) -> (B, S, D), and of an MoE block loads (E,) and the router's logits (T, E)."""
        x, h = self.join(x, self.attend(x, places, cache), None if keys is None else keys[ATTENTION])
        loads: Tensor | None = None
        logits: Tensor | None = None
        if isinstance(self.feed_forward, MoE):
            h, loads, logits = self.feed_forward(h, real, keys)
        else:
            h = self.feed_forward(h)
        return self.add(x, h, None if keys is None else keys[FEED_FORWARD]), loads, logits

    def join(self, x: Tensor, attended: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream after attention (B, S, D), and what the feed-forward reads of it."""
        x = self.add(x, attended, keys)
        return x, self.feed_forward_norm(x)

    def add(self, x: Tensor, h: Tensor, keys: Tensor | None) -> Tensor:
        """The residual stream x and what a half of the block adds to it (B, S, D)."""
        return x + dropout(h, self.dropout, keys)

    def attend(self, x: Tensor, places: Places, cache: LayerCache | None) -> Tensor:
        return self.attention(self.attention_norm(x), places, cache)


class Head(nn.Module):
    """The last norm, the projection to the vocabulary, and the loss, so that sharding gathers its weights once."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.weight = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.dim))
        self.loss: Loss = linear_cross_entropy

    def forward(self, x: Tensor, targets: Tensor | None, embedding: Tensor | None) -> Tensor:
        """x (B, S, D) -> sum of the loss over targets (B, S); without targets logits (B, S, V).

        embedding (V, D) is the projection where the config ties the two: one parameter, handed in. Elsewhere it is
        None, since FSDP would make a gradient of zeros for an argument that is not used.
        """
        x = self.norm(x)
        weight = self.weight if embedding is None else embedding
        assert weight is not None
        weight = cast(weight, x.dtype)
        if targets is None:
            return full_logits(x, weight)
        return self.loss(x.flatten(0, 1), weight, targets.flatten())


class Transformer(nn.Module):
    """A Llama 4 text model. `compute_dtype` is the dtype of its activations; weights stay as they are."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.compute_dtype = torch.float32
        self.embedding = Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.head = Head(config, vocab_size)
        self.penalized = config.aux_loss_weight > 0 or config.z_loss_weight > 0

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        keys: Tensor | None = None,
        cache: KVCache | None = None,
        shares: Tensor | None = None,
    ) -> Output:
        """Loss of tokens (B, S) against targets (B, S), or logits without targets.

        positions (B or 1, S) default to 0..S-1; documents (B, S) keep attention inside each story; keys
        (n_layers + 1, SITES, B) are the random keys of all sites (`site_keys`), None for no dropout and no noise;
        shares (MoE layers, E) are the load shares of the global batch that the auxiliary loss takes.

        With a cache the tokens are first prompts, padded on the right to the longest, then (B, 1) a step; a row is one
        document, and the logits (B, 1, V) are those after its last token.
        """
        real = torch.ones_like(tokens, dtype=torch.bool) if targets is None else targets != IGNORE
        if cache is not None:
            if targets is not None or positions is not None or documents is not None:
                raise ValueError("a cache gives logits, at positions of its own, and its rows are one document each")
            positions, real = cache.begin(tokens.shape[1])
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.embedding(tokens).to(self.compute_dtype)
        dropped = self.training and self.config.attention_dropout > 0
        places = Places.of(self.config, x, positions, documents, dropped)
        x = self.drop(x, None if keys is None else keys[0, EMBEDDING])
        loads: list[Tensor] = []
        router_logits: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            layer_keys = None if keys is None else keys[i + 1]
            x, load, of_router = block(x, places, real, layer_keys, cache.layers[i] if cache else None)
            if load is not None and of_router is not None:
                loads.append(load)
                router_logits.append(of_router)
        x = x if cache is None else cache.end(x)
        result = self.head(x, targets, self.embedding.weight if self.config.tie_embeddings else None)
        load = torch.stack(loads) if loads else torch.zeros(0, self.config.n_experts, dtype=torch.int64)
        statistics = self.statistics(router_logits, real, shares)
        penalty = (self.config.z_loss_weight * statistics[:, 1] + self.config.aux_loss_weight * statistics[:, 2]).sum()
        loss, logits = (None, result) if targets is None else (result, None)
        return Output(loss, logits, load, penalty, statistics)

    def drop(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Dropout of the embedding."""
        return dropout(x, self.config.dropout, keys)

    def statistics(self, logits: list[Tensor], real: Tensor, shares: Tensor | None) -> Tensor:
        """The statistics (MoE layers, 3) of the routers' logits (T, E): of all layers together, for they are small."""
        if not self.training or not logits:
            return torch.zeros(len(logits), 3, device=real.device)
        with torch.set_grad_enabled(self.penalized and torch.is_grad_enabled()):
            return router_statistics(torch.stack(logits), real.flatten(), shares)

    def new_cache(self, prompts: Sequence[int], capacity: int) -> KVCache:
        """An empty cache for prompts of these lengths, and `capacity` tokens a row."""
        like = torch.empty(0, dtype=self.compute_dtype, device=self.embedding.weight.device)
        return KVCache(self.config, prompts, capacity, like)

    def initial_std(self, name: str) -> float:
        """Standard deviation of the initial values of parameter `name`; 0 for norms, which start at 1.

        By fan-in, so that widths from 64 to 5,120 need no other rate; what writes to the residual stream starts
        smaller by sqrt(2 layers) (GPT-2).
        """
        c = self.config
        part = ".".join(name.split(".")[-2:])
        if "norm" in part:
            return 0.0
        if part == "embedding.weight":
            return c.dim**-0.5 if c.tie_embeddings else 1.0
        if part == "attention.wo":
            return (2 * c.n_layers * c.n_heads * c.head) ** -0.5
        if part.endswith(".down"):
            hidden = c.ffn_dim if part == "feed_forward.down" else c.expert_dim
            return (2 * c.n_layers * hidden) ** -0.5
        return c.dim**-0.5

    @torch.no_grad()
    def init_weights(self, seed: int, local: Callable[[str, Tensor], tuple[Tensor, Window]] | None = None) -> None:
        """Fill all weights and buffers by (seed, name): bitwise the same however the weights are sharded.

        `local(name, parameter)` gives the part that lies here and its window in the whole; by default all of it.
        """
        for name, parameter in self.named_parameters():
            part, window = local(name, parameter) if local else (parameter, [(0, n) for n in parameter.shape])
            std = self.initial_std(name)
            if std == 0.0:
                part.fill_(1.0)
            elif part.numel():
                part.copy_(initial_normal(seed, name, parameter.shape, std, window))
        for buffer in self.buffers():
            buffer.zero_()
