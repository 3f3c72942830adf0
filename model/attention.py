"""Attention of Llama 4: in chunks and with RoPE on most layers, over the whole sequence and without positions
(NoPE) on every n-th layer.

| a token sees, of the tokens up to itself    | device          | computed by (`segments.py`)                         |
|---------------------------------------------|-----------------|-----------------------------------------------------|
| its sequence                                | any             | fused attention with `is_causal`                    |
| its chunk, if chunks divide S               | any             | fused attention with `is_causal`; a view makes each |
|                                             |                 | chunk a sequence of the batch                       |
| its chunk                                   | any             | fused attention with `is_causal`, for each group of |
|                                             |                 | segments of similar lengths                         |
| its document (within its chunk)             | any             | fused attention with `is_causal`, for each group of |
|                                             |                 | segments of similar lengths                         |
| its document (within its chunk), no dropout | CUDA, from sm80 | compiled FlexAttention with a block mask            |
| cached tokens (generation)                  | any             | fused attention of one query for each sequence      |
|                                             |                 | (`cache.py`)                                        |

No tensor has S x S numbers: there are neither masks nor scores of that size. With dropout, torch has no fused attention
on a CPU, so the scores of one group of segments exist at a time.

A RoPE layer projects, rotates interleaved pairs (RoPE), and L2-normalizes queries and keys. A NoPE layer scales its
queries by log(1 + floor((position + 1) / temperature_floor)) * temperature_scale + 1 ("temperature tuning", for Llama
4's long contexts).

Letters: B batch, S sequence, D dim, H query heads, KV key and value heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.context import ForwardContext
from model.initial_values import residual_normal, scaled_normal
from model.norm import rms_norm
from model.parts import part
from model.precision import cast
from model.rope import rotate

# Up to this length, bf16 attention trains faster in fp32 on a CPU, see `trains_in_fp32`.
FP32_ATTENTION_TOKENS = 512


class Attention(nn.Module):
    """Grouped-query attention of block `layer` (from 0)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.uses_rope = config.uses_rope(layer)
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head
        self.wqkv = nn.Parameter(torch.empty((self.heads + 2 * self.kv_heads) * self.head_dim, config.dim))
        self.wo = nn.Parameter(torch.empty(config.dim, self.heads * self.head_dim))
        self.initial_values = {
            "wqkv": scaled_normal(config.dim),
            "wo": residual_normal(self.heads * self.head_dim, config.n_layers),
        }

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x (B, S, D) -> (B, S, D)."""
        return self.attend(*self.project(x, context.positions, context.rope), context)

    def project(self, x: Tensor, positions: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) -> q (B, S, H, head_dim), k and v (B, S, KV, head_dim)."""
        return self.position(F.linear(x, cast(self.wqkv, x.dtype)), positions, rope)

    @part(compile=True)
    def position(self, qkv: Tensor, positions: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, S, (H + 2 KV) head_dim) -> q, k, v as in `project`: with RoPE and the norm, or scaled by position."""
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        if self.uses_rope:
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            if torch.compiler.is_compiling():
                # The backward rotates them again from the projection, which v keeps alive because v is a view of it.
                qk = checkpoint(self.rotate_and_norm, qk, rope, use_reentrant=False)
            else:
                qk = self.rotate_and_norm(qk, rope)
            q, k = qk.split((self.heads, self.kv_heads), dim=2)
            return q, k, v
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.config.temperature_tuning:
            wide = torch.promote_types(q.dtype, torch.float32)
            steps = torch.floor((positions.to(wide) + 1) / self.config.temperature_floor)
            scale = torch.log1p(steps) * self.config.temperature_scale + 1
            q = (q * scale[..., None, None]).to(qkv.dtype)
        return q, k, v

    def rotate_and_norm(self, qk: Tensor, rope: Tensor) -> Tensor:
        """Queries and keys (B, S, H + KV, head_dim), rotated to their positions."""
        qk = rotate(qk, rope)
        return rms_norm(qk, None, self.config.norm_eps) if self.config.qk_norm else qk

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> Tensor:
        """The results of `project` -> (B, S, D)."""
        mask = context.attention_mask(self.uses_rope)
        cache = context.layer_cache(self.layer)
        if cache is not None:
            cache.write(k, v)
            if q.shape[1] == 1:  # the tokens of prompts see each other, as they do without a cache
                mask = cache
        if mask is not None:
            out = mask.attend(q, k, v, self._fused)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S, head_dim)
            out = self._fused(q, k, v, causal=True).transpose(1, 2)
        return F.linear(out.flatten(-2), cast(self.wo, out.dtype))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Fused attention, see `segments.FusedAttention`."""
        p = self.config.attention_dropout if self.training else 0.0
        grouped = self.kv_heads != self.heads
        if grouped and q.device.type == "cuda" and not has_flash(q.dtype, torch.cuda.get_device_capability(q.device)):
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            grouped = False
        dtype = q.dtype
        if trains_in_fp32(q):
            q, k, v = (t.float() for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=p, enable_gqa=grouped)
        return out.to(dtype)


def trains_in_fp32(q: Tensor) -> bool:
    """Whether fused attention of bf16 queries like q (B, H, S, head_dim) is computed in fp32 because that is faster.

    On a CPU the backward in bf16 consists of many small matrix multiplications. On a CPU with AVX512-BF16, forward and
    backward in bf16 take 2.5 times as long as in fp32 for sequences of 128 tokens, 1.4 times for 256, as long for 512,
    and less time for longer sequences.
    """
    is_short = q.shape[2] < FP32_ATTENTION_TOKENS
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and is_short and torch.is_grad_enabled()


def has_flash(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a CUDA device of this compute capability has flash attention.

    Flash attention is the only kernel that accepts fewer key heads than query heads. Without it, torch would fall back
    to matrix multiplications that hold S x S scores.
    """
    return dtype in (torch.bfloat16, torch.float16) and capability >= (8, 0)
