"""Random numbers as a function of their place, so that they do not depend on how work is laid out.

Initial weights are drawn by (seed, name, expert), dropout by (seed, step, sequence, site): the same at any number of
processes and at any micro-batch size. No global generator is used.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Window = Sequence[tuple[int, int]]  # (start, stop) in each dimension


def initial_normal(seed: int, name: str, shape: Sequence[int], std: float, window: Window) -> Tensor:
    """`window` of the normal initial values of parameter `name`; of a 3-D `shape` (E, ...) each expert by itself.

    Only experts inside the window are drawn. Returns fp32 on the CPU.
    """
    if len(shape) == 3:
        first, *rest = window
        cut = tuple(slice(a, b) for a, b in rest)
        experts = [_normal(f"{seed}/{name}/{e}", shape[1:], std)[cut] for e in range(*first)]
        return torch.stack(experts) if experts else torch.empty(0, *(b - a for a, b in rest))
    return _normal(f"{seed}/{name}", shape, std)[tuple(slice(a, b) for a, b in window)]


def _normal(place: str, shape: Sequence[int], std: float) -> Tensor:
    generator = torch.Generator().manual_seed(place_seed(place))
    return torch.empty(*shape).normal_(0, std, generator=generator)


def place_seed(place: str) -> int:
    """A 63-bit seed that depends on every letter of `place`."""
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little") >> 1


def sequence_keys(seed: int, step: int, index: Tensor) -> Tensor:
    """The keys of the sequences `index` (B,) of the global batch of `step`. Returns int64 (B,)."""
    return fold(index.to(torch.int64), place_seed(f"{seed}/{step}"))


def fold(keys: Tensor, number: int) -> Tensor:
    """New keys (B,) that depend on every bit of `keys` and of `number` (the finalizer of splitmix64)."""
    x = keys * -0x61C8864680B583EB + (number & 0x7FFFFFFFFFFFFFFF)
    x = (x ^ _shift64(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift64(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift64(x, 31)


def dropout(x: Tensor, p: float, keys: Tensor | None, site: int) -> Tensor:
    """`x` (B, ...) with a share of its numbers set to 0 and the rest scaled up; unchanged without keys.

    The share is p rounded to 1/256. `site` tells the places in the model apart.
    """
    threshold = round(p * 256)
    if keys is None or threshold == 0:
        return x
    random = random_bytes(fold(keys, site), math.prod(x.shape[1:])).view(x.shape)
    return x.masked_fill(random < threshold, 0.0) * (256 / (256 - threshold))


def normal(keys: Tensor, count: int) -> Tensor:
    """fp32 (B, count) standard normal, a function of (key, place) alone (Box and Muller)."""
    bits = random_bytes(keys, 8 * count).contiguous().view(torch.int32)  # (B, 2 count)
    u, v = ((bits >> 8) & 0xFFFFFF).float().add(0.5).mul(2.0**-24).chunk(2, dim=-1)  # inside (0, 1)
    return (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()


def random_bytes(keys: Tensor, count: int) -> Tensor:
    """uint8 (B, count), a function of (key, place) alone."""
    word = torch.arange(-(-count // 4), dtype=torch.int32, device=keys.device)
    low, high = keys.to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]
    # the key enters twice: once would give sequences with near keys the same bytes at shifted places
    return _mix32(_mix32(word ^ low) + high).view(torch.uint8)[:, :count]


def _mix32(x: Tensor) -> Tensor:
    """The finalizer of murmur3: every bit of the result depends on every bit of x (int32)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -0x7A143595
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return x ^ ((x >> 16) & 0xFFFF)


def _shift64(x: Tensor, bits: int) -> Tensor:
    """x >> bits without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
