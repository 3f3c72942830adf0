"""Keys and values of the tokens so far, for generation. Each sequence has its own length, and is one document.

A layer has `n_entries` entries for each sequence, and a token is stored in entry `position % n_entries`. A NoPE layer
sees the whole sequence, so it has an entry for each position. A layer with chunks has one for each position of a chunk.
So nothing must be deleted at the border of a chunk: its first token overwrites entry 0 and, like every other token,
sees the entries up to its own. Those after it are from the chunk before.

1. The prompts (B, S), S > 1, pass through the model like any batch. They are padded on the right, where no token sees
   the padding. Each layer stores the keys and values that later tokens will see.
2. After that, each step takes one token of each sequence, at the sequence's own position.

Letters: B batch, S sequence, H query heads, KV key and value heads, D dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig


class CacheEntries:
    """The entries that the tokens of the present step write and see; the same for all layers of a kind.

    Attributes:
        n_entries: entries for each sequence.
        lengths: tokens of each sequence, those of the present step included.
        last: the largest entry that a sequence writes.
        written: (B,) the entry that each sequence writes; None if all sequences write `last`.
        visible: (B, 1, 1, last + 1) whether a sequence sees an entry; None if all sequences see all of them.
    """

    def __init__(self, n_entries: int) -> None:
        self.n_entries = n_entries
        self.lengths: list[int] = []
        self.last = 0
        self.written: Tensor | None = None
        self.visible: Tensor | None = None

    def start_step(self, lengths: Sequence[int], device: torch.device) -> None:
        """lengths of the sequences, with the tokens of the step that starts."""
        self.lengths = list(lengths)
        written = [(length - 1) % self.n_entries for length in lengths]
        self.last = max(written)
        self.written, self.visible = None, None
        if min(written) < self.last:
            self.written = torch.tensor(written, device=device)
            self.visible = (torch.arange(self.last + 1, device=device) <= self.written[:, None])[:, None, None]


class LayerCache:
    """Keys and values (B, entries, KV, head_dim) of one layer, and the mask of a step (`segments.AttentionMask`)."""

    def __init__(self, entries: CacheEntries, batch: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        self.entries = entries
        self.k = like.new_zeros(batch, entries.n_entries, kv_heads, head_dim)
        self.v = torch.zeros_like(self.k)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Store k and v (B, S, KV, head_dim): those of the prompts if S > 1, else those of one step."""
        self._write(self.k, k.detach())
        self._write(self.v, v.detach())

    def _write(self, stored: Tensor, new: Tensor) -> None:
        entries = self.entries
        if new.shape[1] > 1:
            for i, end in enumerate(entries.lengths):
                first = end // entries.n_entries * entries.n_entries  # of the chunk that the next token belongs to
                stored[i, : end - first] = new[i, first:end]
        elif entries.written is None:
            stored[:, entries.last] = new[:, 0]
        else:
            stored[torch.arange(len(new), device=new.device), entries.written] = new[:, 0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: object = None) -> Tensor:
        """q (B, 1, H, head_dim) -> the same shape, without dropout; `write` has stored k and v already."""
        used, kv_heads = self.entries.last + 1, self.k.shape[2]
        # Query heads that share a key head become queries of one head. No mask is causal here, so this is possible.
        grouped = q.reshape(len(q), kv_heads, -1, q.shape[-1])
        k, v = (stored[:, :used].transpose(1, 2) for stored in (self.k, self.v))
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.entries.visible).reshape(q.shape)


class KVCache:
    """The caches of all layers."""

    def __init__(self, config: ModelConfig, prompts: Sequence[int], capacity: int, like: Tensor) -> None:
        """Empty, for prompts of these lengths, and sequences of at most `capacity` tokens.

        dtype and device are like's.
        """
        self.capacity, self.device = capacity, like.device
        self.lengths = list(prompts)  # of the sequences, with the tokens of the next step
        self.is_empty = True
        full, chunked = CacheEntries(capacity), CacheEntries(min(capacity, config.attention_chunk or capacity))
        self._kinds = (full, chunked)
        self.layers = [
            LayerCache(chunked if config.uses_rope(i) else full, len(self.lengths), config.kv_heads, config.head, like)
            for i in range(config.n_layers)
        ]

    def start_step(self, length: int) -> tuple[Tensor, Tensor]:
        """To be called before the layers, with the shape (B, length) of the step's tokens.

        Returns their positions (B or 1, length), and whether each is real, which means that it is not padding
        (B, length). Raises ValueError if the tokens do not fit: the first step takes the prompts, each later step one
        token of each sequence.
        """
        longest = max(self.lengths)
        expected = longest if self.is_empty else 1
        if length != expected or longest > self.capacity:
            sequences = f"{'prompts' if self.is_empty else 'sequences'} of lengths {self.lengths}"
            raise ValueError(
                f"{length} tokens per sequence do not fit {sequences} in a cache of {self.capacity} tokens"
            )
        for kind in self._kinds:
            kind.start_step(self.lengths, self.device)
        ends = torch.tensor(self.lengths, device=self.device)[:, None]
        if not self.is_empty:
            return ends - 1, torch.ones_like(ends, dtype=torch.bool)
        positions = torch.arange(length, device=self.device)[None]
        return positions, positions < ends

    def finish_step(self, x: Tensor) -> Tensor:
        """To be called after the layers: x (B, length, D) -> that of each sequence's last token (B, 1, D)."""
        if x.shape[1] > 1:
            x = torch.stack([sequence[length - 1 : length] for sequence, length in zip(x, self.lengths, strict=True)])
        self.lengths = [length + 1 for length in self.lengths]
        self.is_empty = False
        return x

    def keep_sequences(self, kept: Sequence[int]) -> None:
        """Drop all sequences but `kept`, which become sequences 0, 1, ..."""
        self.lengths = [self.lengths[i] for i in kept]
        index = torch.tensor(kept, device=self.device)
        for layer in self.layers:
            layer.k, layer.v = layer.k.index_select(0, index), layer.v.index_select(0, index)
