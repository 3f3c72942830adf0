"""The inputs of a forward besides the tokens, in one object that every layer receives with the residual stream.

A token is *real* if its target enters the loss, which means that the target is not IGNORE. Padding is not real, and
neither is the last token before another story. In generation, where there are no targets, all tokens but the padding of
prompts are real. Tokens that are not real are sent to no expert.

Letters: B batch, S sequence, D dim, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import KVCache, LayerCache
from model.config import ModelConfig
from model.rope import rope_table
from model.segments import AttentionMask, attention_masks


@dataclass(frozen=True)
class ForwardContext:
    """The inputs that all layers of one forward share."""

    is_real: Tensor  # (B, S) bool: whether a token is real, see above
    positions: Tensor  # (B or 1, S), from 0
    rope: Tensor  # (B or 1, S, 1, head_dim / 2, 2), see `rope_table`
    full_mask: AttentionMask | None  # of NoPE layers; None: a token sees its whole sequence up to itself
    chunked_mask: AttentionMask | None  # of RoPE layers
    rng_keys: Tensor | None  # (n_layers + 1, SITES, B), see `random.site_keys`; None: no dropout and no router noise
    load_shares: Tensor | None  # (MoE layers, E): shares of the global batch's load, for the auxiliary loss
    cache: KVCache | None  # keys and values of earlier tokens, in generation

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        x: Tensor,
        *,
        is_real: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        rng_keys: Tensor | None = None,
        load_shares: Tensor | None = None,
        cache: KVCache | None = None,
        attention_dropout: bool = False,
    ) -> "ForwardContext":
        """The context of a forward whose activations have the shape, dtype and device of x (B, S, D).

        Args:
            is_real: (B, S) bool; by default all tokens are real.
            positions: (B or 1, S); by default 0 to S - 1.
            documents: (B, S), a number for each token, which changes at the first token of a document; by default each
                sequence is one document.
            attention_dropout: whether attention weights will be dropped; FlexAttention does not support it.
            rng_keys, load_shares, cache: as in the class.
        """
        batch, length = x.shape[:2]
        if is_real is None:
            is_real = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        if positions is None:
            positions = torch.arange(length, device=x.device)[None]
        full, chunked = attention_masks(config, positions, documents, x, attention_dropout)
        rope = rope_table(config, positions, x.dtype)
        return cls(is_real, positions, rope, full, chunked, rng_keys, load_shares, cache)

    def rng_keys_of(self, layer: int | None, site: int) -> Tensor | None:
        """The random keys (B,) of a site (`random.ATTENTION` and others) of a layer; layer None is the embedding."""
        if self.rng_keys is None:
            return None
        return self.rng_keys[0 if layer is None else layer + 1, site]

    def attention_mask(self, uses_rope: bool) -> AttentionMask | None:
        """The mask of a layer; None: each token sees its whole sequence up to itself."""
        return self.chunked_mask if uses_rope else self.full_mask

    def layer_cache(self, layer: int) -> LayerCache | None:
        return None if self.cache is None else self.cache.layers[layer]
