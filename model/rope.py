"""Rotary position embeddings (RoPE, arXiv:2104.09864) on interleaved pairs, with the scaling of Llama 3.

Letters: B batch, S sequence, H heads.
"""

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs, fp32 (arXiv:2104.09864, equation 15)."""
    # The last bit of theta ** -x differs from that of published models, and far positions magnify the difference.
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is None:
        return frequency
    wavelength = 2 * torch.pi / frequency
    rotations = scaling.original_max_position_embeddings / wavelength  # over the length of the original training
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if high > low:
        unscaled = ((rotations - low) / (high - low)).clamp(0, 1)
    else:
        unscaled = (rotations > low).float()
    return unscaled * frequency + (1 - unscaled) * frequency / scaling.factor


def rope_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """positions (B or 1, S) -> rope (B or 1, S, 1, head_dim / 2, 2): the cosine and the sine of each pair's angle.

    The table is in fp32, or in fp64 if activations have that dtype.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequency = rope_frequencies(config.head, config.rope_theta, config.rope_scaling, positions.device)
    angle = positions[..., None, None].to(wide) * frequency.to(wide)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair (2i, 2i + 1) of x (B, S, H, head_dim) by its angle in rope, see `rope_table`."""
    pairs = x.to(rope.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler does not support complex numbers
        a, b = pairs.unbind(-1)
        cos, sin = rope.unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return rotated.flatten(-2).to(x.dtype)
