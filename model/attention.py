"""Attention of Llama 4: chunked with RoPE on most layers, whole and without positions (NoPE) on every n-th.

| mask                         | how                                                                   |
|------------------------------|-----------------------------------------------------------------------|
| causal                       | fused attention, `is_causal`                                          |
| causal within chunks         | the same, with chunks folded into the batch                           |
| documents (packed stories)   | fused attention with a boolean mask (B, 1, S, S), made once a forward |
| cached (generation)          | the last query sees all it may without a mask; several get one        |

Order on a RoPE layer: project, RoPE on interleaved pairs, L2 norm of queries and keys. On a NoPE layer queries are
scaled by log(1 + floor((position + 1) / floor)) * scale + 1 ("temperature tuning", Llama 4's long contexts).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs, fp32 (RoFormer, arXiv:2104.09864, eq. 15)."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is None:
        return frequency
    wavelength = 2 * torch.pi / frequency
    turns = scaling.original_max_position_embeddings / wavelength
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, S, H, head_dim) with pair (2i, 2i+1), as a complex number, times turn (B or 1, S, 1, head_dim / 2)."""
    pairs = torch.view_as_complex(x.to(turn.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


@dataclass
class Places:
    """Where the tokens of a forward stand; the same for all layers."""

    positions: Tensor  # (B or 1, S)
    turn: Tensor  # (B or 1, S, 1, head_dim / 2), complex: RoPE's rotation at each position
    full_mask: Tensor | None = None  # (B, 1, S, S), with documents only
    chunk_mask: Tensor | None = None

    @classmethod
    def of(cls, config: ModelConfig, positions: Tensor, documents: Tensor | None, dtype: torch.dtype) -> "Places":
        """positions (B or 1, S), documents (B, S) or None -> the tables that attention needs."""
        wide = torch.promote_types(dtype, torch.float32)
        frequency = rope_frequencies(config.head, config.rope_theta, config.rope_scaling, positions.device)
        angle = positions[..., None, None].to(wide) * frequency.to(wide)
        places = cls(positions, torch.polar(torch.ones_like(angle), angle))
        if documents is not None:
            length = positions.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
            same = documents[:, :, None] == documents[:, None, :]
            places.full_mask = (same & causal)[:, None]
            places.chunk_mask = places.full_mask
            if config.attention_chunk is not None:
                chunk = positions // config.attention_chunk
                places.chunk_mask = places.full_mask & (chunk[:, :, None] == chunk[:, None, :])[:, None]
        return places


class KVCache:
    """Keys and values of one layer, for generation: (B, KV heads, capacity, head_dim), filled from the front."""

    def __init__(self, batch: int, heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        self.k = like.new_empty(batch, heads, capacity, head_dim)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, KV heads, S, head_dim) -> all keys and values so far."""
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Grouped-query attention of layer `layer`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.rope = config.uses_rope(layer)
        self.chunk = config.attention_chunk if self.rope else None
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head
        self.wqkv = nn.Parameter(torch.empty((self.heads + 2 * self.kv_heads) * self.head_dim, config.dim))
        self.wo = nn.Parameter(torch.empty(config.dim, self.heads * self.head_dim))

    def forward(self, x: Tensor, places: Places, cache: KVCache | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D)."""
        qkv = F.linear(x, self.wqkv.to(x.dtype)).unflatten(-1, (-1, self.head_dim))  # (B, S, H + 2 KV, head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.rope:
            qk = rotate(qkv[:, :, : self.heads + self.kv_heads], places.turn)
            if self.config.qk_norm:
                qk = F.rms_norm(qk.to(wide), (self.head_dim,), eps=self.config.norm_eps).to(x.dtype)
            q, k = qk.split((self.heads, self.kv_heads), dim=2)
        elif self.config.temperature_tuning:
            steps = torch.floor((places.positions.to(wide) + 1) / self.config.temperature_floor)
            scale = torch.log1p(steps) * self.config.temperature_scale + 1
            q = (q * scale[..., None, None]).to(x.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S, head_dim)
        out = self._attend(q, k, v, places) if cache is None else self._cached(q, k, v, cache)
        return F.linear(out.transpose(1, 2).flatten(-2), self.wo.to(x.dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        mask = places.chunk_mask if self.rope else places.full_mask
        if mask is not None:
            return self._fused(q, k, v, mask=mask)
        length, chunk = q.shape[2], self.chunk
        if chunk is None or length <= chunk:
            return self._fused(q, k, v, causal=True)
        # chunks become rows of the batch; the filler at the end is behind every real query
        filler = -length % chunk
        q, k, v = (
            F.pad(t, (0, 0, 0, filler)).unflatten(2, (-1, chunk)).transpose(1, 2).flatten(0, 1) for t in (q, k, v)
        )
        out = self._fused(q, k, v, causal=True)
        out = out.unflatten(0, (-1, (length + filler) // chunk)).transpose(1, 2).flatten(2, 3)
        return out[:, :, :length]

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        before, length = cache.length, q.shape[2]
        k, v = cache.append(k, v)
        query = torch.arange(before, before + length, device=q.device)
        first = 0 if self.chunk is None else before // self.chunk * self.chunk  # nobody looks further back
        key = torch.arange(first, before + length, device=q.device)
        mask = None
        if length > 1:
            mask = key <= query[:, None]
            if self.chunk is not None:
                mask &= key // self.chunk == query[:, None] // self.chunk
        return self._fused(q, k[:, :, first:], v[:, :, first:], mask=mask)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        p = self.config.attention_dropout if self.training else 0.0
        grouped = self.kv_heads != self.heads
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=p, enable_gqa=grouped
        )
