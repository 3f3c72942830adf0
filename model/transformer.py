"""The model: tokens -> loss on one device, by an embedding, blocks, and a head that computes the loss.

It is written as if for one process; `parallel` shards it from outside. Weights are cast to the dtype of the activations
where they are used, so the same lines run in fp32 and, with sharded weights that are cast already, in bf16.

Letters: B batch, S sequence, T = B*S tokens, D dim, E experts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention
from model.cache import KVCache
from model.config import ModelConfig
from model.context import ForwardContext
from model.feed_forward import FeedForward
from model.initial_values import Constant, Normal, initial_values, scaled_normal
from model.loss import IGNORE, Loss, chunk_gradient, full_logits, linear_cross_entropy
from model.moe import MoE, router_statistics
from model.norm import RMSNorm
from model.parts import part
from model.precision import cast
from model.random import ATTENTION, EMBEDDING, FEED_FORWARD, Window, dropout, initial_normal


class Output(NamedTuple):
    """The results of a forward."""

    loss: Tensor | None  # the sum over all targets but IGNORE; None without targets
    logits: Tensor | None  # (B, S, V); None with targets
    loads: Tensor  # (MoE layers, E) int64: real rows routed to each expert, see `moe.py`
    penalty: Tensor  # the sum of the routers' auxiliary loss and z-loss, times their weights; to be added to the loss
    statistics: Tensor  # (MoE layers, 3), see `moe.router_statistics`; zero outside of training


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, config.dim))
        self.initial_values = {"weight": scaled_normal(config.dim) if config.tie_embeddings else Normal(1.0)}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, S) -> (B, S, D)."""
        return F.embedding(tokens, self.weight)


class Block(nn.Module):
    """Block `layer` (from 0): x + attention(norm(x)), then x + feed_forward(norm(x)), which is dense or an MoE."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MoE(config, layer) if config.is_moe(layer) else FeedForward(config, config.ffn_dim)

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x (B, S, D) -> (B, S, D), and of an MoE loads (E,) and the router's logits (T, E)."""
        x, h = self.add_attention(x, self.attend(x, context), context.rng_keys_of(self.layer, ATTENTION))
        loads: Tensor | None = None
        logits: Tensor | None = None
        if isinstance(self.feed_forward, MoE):
            h, loads, logits = self.feed_forward(h, context)
        else:
            h = self.feed_forward(h)
        return self.add_feed_forward(x, h, context.rng_keys_of(self.layer, FEED_FORWARD)), loads, logits

    @part(recompute="selective")
    def attend(self, x: Tensor, context: ForwardContext) -> Tensor:
        return self.attention(self.attention_norm(x), context)

    @part(compile=True, recompute="full")
    def add_attention(self, x: Tensor, attended: Tensor, rng_keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream after attention (B, S, D), and its norm, the input of the feed-forward."""
        x = x + dropout(attended, self.dropout, rng_keys)
        return x, self.feed_forward_norm(x)

    @part(compile=True)
    def add_feed_forward(self, x: Tensor, h: Tensor, rng_keys: Tensor | None) -> Tensor:
        """The residual stream after the feed-forward (B, S, D)."""
        return x + dropout(h, self.dropout, rng_keys)


class Head(nn.Module):
    """The last norm, the projection to the vocabulary, and the loss, in one module, so that FSDP gathers it once."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.weight = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.dim))
        self.initial_values = {"weight": scaled_normal(config.dim)}
        self.loss: Loss | None = None  # a loss to use instead of the built-in one, for example Liger's

    def forward(self, x: Tensor, targets: Tensor | None, embedding: Tensor | None) -> Tensor:
        """x (B, S, D) -> the sum of the loss over targets (B, S); without targets, logits (B, S, V).

        embedding (V, D) is the projection if the config ties the two: the parameter of the embedding, passed as an
        argument. Otherwise it is None, because FSDP would make a gradient of zeros for an argument that is not used.
        """
        x = self.norm(x)
        weight = self.weight if embedding is None else embedding
        assert weight is not None
        weight = cast(weight, x.dtype)
        if targets is None:
            return full_logits(x, weight)
        hidden, targets = x.flatten(0, 1), targets.flatten()
        if self.loss is not None:
            return self.loss(hidden, weight, targets)
        return linear_cross_entropy(hidden, weight, targets, self.chunk_gradient)

    @part(compile=True)
    def chunk_gradient(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `loss.chunk_gradient`."""
        return chunk_gradient(logits, targets)


class Transformer(nn.Module):
    """A Llama 4 text model. `compute_dtype` is the dtype of its activations; weights keep their own."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.compute_dtype = torch.float32
        self.embedding = Embedding(config, vocab_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.head = Head(config, vocab_size)
        self.has_router_loss = config.has_router_loss

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        rng_keys: Tensor | None = None,
        cache: KVCache | None = None,
        load_shares: Tensor | None = None,
    ) -> Output:
        """Loss of tokens (B, S) against targets (B, S), or logits without targets.

        Args:
            positions: (B or 1, S), by default 0 to S - 1.
            documents: (B, S), a number for each token; attention stays within tokens of the same number.
            rng_keys: (n_layers + 1, SITES, B), the random keys of all sites (`random.site_keys`); by default neither
                dropout nor router noise.
            cache: keys and values of earlier tokens. The first forward with a cache takes prompts, padded on the right
                to the longest, and each later one (B, 1) tokens. A sequence is one document, and logits (B, 1, V) are
                those after its last token.
            load_shares: (MoE layers, E), each expert's share of the global batch's load, for the auxiliary loss.

        Raises ValueError if a cache is combined with targets, positions or documents, or if tokens do not fit it.
        """
        is_real = None if targets is None else targets != IGNORE
        if cache is not None:
            if targets is not None or positions is not None or documents is not None:
                raise ValueError(
                    "cache: does not go together with targets, positions or documents; it has its own positions, and "
                    "each sequence is one document"
                )
            positions, is_real = cache.start_step(tokens.shape[1])
        x = self.embedding(tokens).to(self.compute_dtype)
        context = ForwardContext.create(
            self.config,
            x,
            is_real=is_real,
            positions=positions,
            documents=documents,
            rng_keys=rng_keys,
            load_shares=load_shares,
            cache=cache,
            attention_dropout=self.training and self.config.attention_dropout > 0,
        )
        x = self.drop_embedding(x, context.rng_keys_of(None, EMBEDDING))
        loads: list[Tensor] = []
        router_logits: list[Tensor] = []
        for block in self.blocks:
            x, block_loads, block_logits = block(x, context)
            if block_loads is not None and block_logits is not None:
                loads.append(block_loads)
                router_logits.append(block_logits)
        if cache is not None:
            x = cache.finish_step(x)
        result = self.head(x, targets, self.embedding.weight if self.config.tie_embeddings else None)
        all_loads = torch.stack(loads) if loads else torch.zeros(0, self.config.n_experts, dtype=torch.int64)
        statistics = self.router_statistics(router_logits, context.is_real, context.load_shares)
        penalty = (self.config.z_loss_weight * statistics[:, 1] + self.config.aux_loss_weight * statistics[:, 2]).sum()
        loss, logits = (None, result) if targets is None else (result, None)
        return Output(loss, logits, all_loads, penalty, statistics)

    @part(compile=True)
    def drop_embedding(self, x: Tensor, rng_keys: Tensor | None) -> Tensor:
        """Dropout of the embedding (B, S, D)."""
        return dropout(x, self.config.dropout, rng_keys)

    @part(compile=True)
    def router_statistics(self, logits: list[Tensor], is_real: Tensor, load_shares: Tensor | None) -> Tensor:
        """The statistics (MoE layers, 3) of the routers' logits (T, E), of all layers at once, since they are small."""
        if not self.training or not logits:
            return torch.zeros(len(logits), 3, device=is_real.device)
        with torch.set_grad_enabled(self.has_router_loss and torch.is_grad_enabled()):
            return router_statistics(torch.stack(logits), is_real.flatten(), load_shares)

    def new_cache(self, prompts: Sequence[int], capacity: int) -> KVCache:
        """An empty cache for prompts of these lengths, and sequences of at most `capacity` tokens."""
        like = torch.empty(0, dtype=self.compute_dtype, device=self.embedding.weight.device)
        return KVCache(self.config, prompts, capacity, like)

    @torch.no_grad()
    def init_weights(self, seed: int, local: Callable[[str, Tensor], tuple[Tensor, Window]] | None = None) -> None:
        """Fill all weights by (seed, name), bitwise the same however they are sharded, and all buffers with zeros.

        `local(name, parameter)` returns this process's shard of a parameter, and its window in the whole parameter. By
        default the shard is the whole. Raises LookupError for a parameter whose module declares no initial values.
        """
        for name, parameter in self.named_parameters():
            values = initial_values(self, name)
            if local is None:
                shard: Tensor = parameter
                window: Window = [(0, n) for n in parameter.shape]
            else:
                shard, window = local(name, parameter)
            if isinstance(values, Constant):
                shard.fill_(values.value)
            elif shard.numel():
                shard.copy_(initial_normal(seed, name, parameter.shape, values.std, window))
        for buffer in self.buffers():
            buffer.zero_()
