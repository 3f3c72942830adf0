"""Attention of Llama 4: chunked with RoPE on most layers, whole and without positions (NoPE) on every n-th.

| a token sees                     | device, dropout        | how (`segments.py`)                                   |
|----------------------------------|------------------------|-------------------------------------------------------|
| the row before it                | any                    | fused attention, `is_causal`                          |
| its chunk, where chunks divide S | any                    | the same, with chunks as rows of the batch: a view    |
| its chunk, its document or both  | any but the next       | the same, by groups of segments of like length        |
| its document, or both            | CUDA from sm80, none   | compiled FlexAttention with a mask of blocks          |
| what is cached (generation)      | any                    | one query a row (`cache.py`)                          |

Nothing of S x S is held, neither mask nor scores. With dropout torch has no fused attention on a CPU: there the scores
of one group of segments are held at a time.

Order on a RoPE layer: project, RoPE on interleaved pairs, L2 norm of queries and keys. On a NoPE layer queries are
scaled by log(1 + floor((position + 1) / floor)) * scale + 1 ("temperature tuning", Llama 4's long contexts).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.cache import LayerCache
from model.config import ModelConfig, RopeScaling
from model.norm import rms_norm
from model.precision import cast
from model.segments import Groups, Past, segmented


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs, fp32 (RoFormer, arXiv:2104.09864, eq. 15)."""
    # not theta ** -x: its last bit is another than that of published models, and far positions magnify it
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is None:
        return frequency
    wavelength = 2 * torch.pi / frequency
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns > low).float()
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, S, H, head_dim), turn (B or 1, S, 1, head_dim / 2, 2): each pair (2i, 2i+1) by its cosine and sine."""
    pairs = x.to(turn.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which knows no complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return turned.flatten(-2).to(x.dtype)


@dataclass
class Places:
    """Where the tokens of a forward stand, and what they see; the same for all layers of a kind."""

    positions: Tensor  # (B or 1, S)
    turn: Tensor  # (B or 1, S, 1, head_dim / 2, 2): cosine and sine of RoPE's angle at each position
    whole: Past | None = None  # on NoPE layers; None: the whole row before a token
    chunked: Past | None = None  # on RoPE layers

    @classmethod
    def of(
        cls, config: ModelConfig, x: Tensor, positions: Tensor, documents: Tensor | None = None, dropout: bool = False
    ) -> "Places":
        """x (B, S, D), positions (B or 1, S), documents (B, S) that change where a story begins -> the tables.

        dropout: whether attention weights will be dropped.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        frequency = rope_frequencies(config.head, config.rope_theta, config.rope_scaling, x.device)
        angle = positions[..., None, None].to(wide) * frequency.to(wide)
        places = cls(positions, torch.stack([angle.cos(), angle.sin()], dim=-1))
        chunk, (batch, length) = config.attention_chunk, x.shape[:2]
        if documents is not None:
            starts = _changes(documents)
            places.whole = places.chunked = segmented(starts, x, dropout)
            if chunk is not None:
                places.chunked = segmented(starts | _changes(positions // chunk), x, dropout)
        elif chunk is not None and chunk < length:
            places.chunked = Groups((torch.arange(length) % chunk == 0).expand(batch, -1), x.device)
        return places


def _changes(x: Tensor) -> Tensor:
    """x (B, S) -> whether each number differs from the one before it; the first of a row does."""
    return F.pad(x[:, 1:] != x[:, :-1], (1, 0), value=True)


class Attention(nn.Module):
    """Grouped-query attention of layer `layer`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.rope = config.uses_rope(layer)
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head
        self.wqkv = nn.Parameter(torch.empty((self.heads + 2 * self.kv_heads) * self.head_dim, config.dim))
        self.wo = nn.Parameter(torch.empty(config.dim, self.heads * self.head_dim))

    def forward(self, x: Tensor, places: Places, cache: LayerCache | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D)."""
        return self.attend(*self.project(x, places.positions, places.turn), places, cache)

    def project(self, x: Tensor, positions: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) -> q (B, S, H, head_dim), k, v (B, S, KV, head_dim)."""
        return self.position(F.linear(x, cast(self.wqkv, x.dtype)), positions, turn)

    def position(self, qkv: Tensor, positions: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, S, (H + 2 KV) head_dim) -> as `project`: RoPE and the norm of queries and keys, or their scale."""
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        if self.rope:
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            if torch.compiler.is_compiling():
                # The backward turns them again from the projection, which v keeps alive as a view of it.
                qk = checkpoint(self.turn, qk, turn, use_reentrant=False)
            else:
                qk = self.turn(qk, turn)
            return *qk.split((self.heads, self.kv_heads), dim=2), v
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.config.temperature_tuning:
            wide = torch.promote_types(q.dtype, torch.float32)
            steps = torch.floor((positions.to(wide) + 1) / self.config.temperature_floor)
            scale = torch.log1p(steps) * self.config.temperature_scale + 1
            q = (q * scale[..., None, None]).to(qkv.dtype)
        return q, k, v

    def turn(self, qk: Tensor, turn: Tensor) -> Tensor:
        """Queries and keys (B, S, H + KV, head_dim) at their positions."""
        qk = rotate(qk, turn)
        return rms_norm(qk, None, self.config.norm_eps) if self.config.qk_norm else qk

    def attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places, cache: LayerCache | None = None) -> Tensor:
        """What `project` gave -> (B, S, D)."""
        past = places.chunked if self.rope else places.whole
        if cache is not None:
            cache.write(k, v)
            past = cache if q.shape[1] == 1 else past  # prompts see themselves, as without a cache
        if past is not None:
            out = past.attend(q, k, v, self._fused)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S, head_dim)
            out = self._fused(q, k, v, causal=True).transpose(1, 2)
        return F.linear(out.flatten(-2), cast(self.wo, out.dtype))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        p = self.config.attention_dropout if self.training else 0.0
        grouped = self.kv_heads != self.heads
        if grouped and q.device.type == "cuda" and not has_flash(q.dtype, torch.cuda.get_device_capability(q.device)):
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            grouped = False
        dtype = q.dtype
        if trains_in_fp32(q):
            q, k, v = (t.float() for t in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=p, enable_gqa=grouped
        ).to(dtype)


def trains_in_fp32(q: Tensor) -> bool:
    """Whether fused attention of bf16 queries like q (B, H, S, head_dim) is computed in fp32, since that is faster.

    On a CPU its backward in bf16 makes many small products: on one with AVX512-BF16 forward and backward take 2.5 times
    as long as in fp32 for rows of 128 tokens, 1.4 times for 256, as long for 512, and less for longer ones.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < 512 and torch.is_grad_enabled()


def has_flash(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a CUDA device of this capability has flash attention.

    It is the one kernel that takes fewer key heads than query heads; without it torch would fall back to products that
    hold S x S scores.
    """
    return dtype in (torch.bfloat16, torch.float16) and capability >= (8, 0)
