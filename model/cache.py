"""Keys and values of the tokens so far, for generation: each row has its own length, and a row is one document.

A layer has a number of slots, and a token's slot is its position modulo that number. A NoPE layer sees everything, so
it has a slot for each position; a chunked layer has as many as its chunk, so that at a border nothing is deleted: the
first token of a chunk writes slot 0 and, like all others, sees the slots up to its own. What lies behind them is old.

1. The prompts (B, S), S > 1, go through the model as any batch, padded on the right, where nobody sees the padding;
   of their keys and values each layer keeps what later tokens will see.
2. Each step then takes one token a row, at the row's own position.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig


class Slots:
    """Where the tokens of the coming step go in the layers of a kind, and what they see there."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.lengths: list[int] = []  # of the rows, with the tokens of this step
        self.last = 0  # slot in use that is furthest back
        self.own: Tensor | None = None  # (B,) each row's slot, and (B, 1, 1, last + 1) whether it sees one;
        self.seen: Tensor | None = None  # None where all rows have the same

    def move(self, lengths: Sequence[int], device: torch.device) -> None:
        """lengths of the rows, with the tokens of the coming step."""
        self.lengths = list(lengths)
        own = [(length - 1) % self.count for length in lengths]
        self.last, self.own, self.seen = max(own), None, None
        if min(own) < self.last:
            self.own = torch.tensor(own, device=device)
            self.seen = (torch.arange(self.last + 1, device=device) <= self.own[:, None])[:, None, None]


class LayerCache:
    """Keys and values (B, slots, KV heads, head_dim) of one layer; what its one query a row sees (`segments.Past`)."""

    def __init__(self, slots: Slots, batch: int, heads: int, head_dim: int, like: Tensor) -> None:
        self.slots = slots
        self.k = like.new_zeros(batch, slots.count, heads, head_dim)
        self.v = torch.zeros_like(self.k)

    def write(self, k: Tensor, v: Tensor) -> None:
        """k, v (B, S, KV heads, head_dim): the prompts' with S > 1, else those of a step."""
        slots, batch, length = self.slots, k.shape[0], k.shape[1]
        for kept, new in ((self.k, k.detach()), (self.v, v.detach())):
            if length == 1 and slots.own is None:
                kept[:, slots.last] = new[:, 0]
            elif length == 1:
                kept[torch.arange(batch, device=k.device), slots.own] = new[:, 0]
            else:
                for row, end in enumerate(slots.lengths):
                    first = end // slots.count * slots.count  # of the chunk that the next token is in
                    kept[row, : end - first] = new[row, first:end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: object = None) -> Tensor:
        """q (B, 1, H, head_dim) -> the same; k and v are written already. Without dropout."""
        used, heads = self.slots.last + 1, self.k.shape[2]
        # the heads that share a key are queries of one head: nothing is causal between them
        grouped = q.reshape(len(q), heads, -1, q.shape[-1])
        k, v = (kept[:, :used].transpose(1, 2) for kept in (self.k, self.v))
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.slots.seen).reshape(q.shape)


class KVCache:
    """The caches of all layers."""

    def __init__(self, config: ModelConfig, prompts: Sequence[int], capacity: int, like: Tensor) -> None:
        """Empty, for prompts of these lengths and `capacity` tokens a row, on the device and in the dtype of `like`."""
        self.capacity, self.device = capacity, like.device
        self.lengths = list(prompts)  # of the rows, with the tokens of the coming step
        self.empty = True
        whole, chunked = Slots(capacity), Slots(min(capacity, config.attention_chunk or capacity))
        self._kinds = (whole, chunked)
        self.layers = [
            LayerCache(chunked if config.uses_rope(i) else whole, len(self.lengths), config.kv_heads, config.head, like)
            for i in range(config.n_layers)
        ]

    def begin(self, length: int) -> tuple[Tensor, Tensor]:
        """Before the layers: the tokens (B, length) of a step -> their positions (B or 1, length), and which are real.

        Raises ValueError for tokens that do not fit: prompts are first and once, one token a row follows.
        """
        longest = max(self.lengths)
        if length != (longest if self.empty else 1) or longest > self.capacity:
            state = "prompts" if self.empty else "rows"
            raise ValueError(f"{length} tokens a row do not fit {state} of {self.lengths} in {self.capacity} places")
        for kind in self._kinds:
            kind.move(self.lengths, self.device)
        ends = torch.tensor(self.lengths, device=self.device)[:, None]
        if not self.empty:
            return ends - 1, torch.ones_like(ends, dtype=torch.bool)
        positions = torch.arange(length, device=self.device)[None]
        return positions, positions < ends

    def end(self, x: Tensor) -> Tensor:
        """After the layers: x (B, length, D) -> that of each row's last token (B, 1, D); the next step is awaited."""
        if x.shape[1] > 1:
            x = torch.stack([row[length - 1 : length] for row, length in zip(x, self.lengths, strict=True)])
        self.lengths, self.empty = [length + 1 for length in self.lengths], False
        return x

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the other rows: these become 0, 1, ..."""
        self.lengths = [self.lengths[row] for row in rows]
        index = torch.tensor(rows, device=self.device)
        for layer in self.layers:
            layer.k, layer.v = layer.k.index_select(0, index), layer.v.index_select(0, index)
