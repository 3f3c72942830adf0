"""Random numbers as a function of where they are used, so that they do not depend on the layout of the work.

Initial weights are seeded with (seed, name, expert), dropout and router noise with (seed, step, sequence, layer, site);
a site is an operation of a layer that draws random numbers. So they are the same for any number of processes and any
micro-batch size. No global generator is used.

A generator is seeded with a text, its `stream`, for example "seed/name".

Letters: B batch, E experts.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Window = Sequence[tuple[int, int]]  # (start, stop) in each dimension

EMBEDDING, ATTENTION, FEED_FORWARD, NOISE = range(4)  # sites
SITES = 4
BLOCK_NUMBERS = 1 << 25  # numbers that one generator draws for an initial weight: 128 MiB of fp32


def initial_normal(seed: int, name: str, shape: Sequence[int], std: float, window: Window) -> Tensor:
    """`window` of the normal initial values of parameter `name`. Of a 3-D `shape` (E, ...) each expert is drawn alone.

    Only experts and blocks of matrix rows that overlap the window are drawn, so that no process draws or holds the
    whole of a large weight. Returns fp32 on the CPU.
    """
    if len(shape) == 3:
        (start, stop), *matrix_window = window
        experts = [_matrix(f"{seed}/{name}/{expert}", shape[1:], std, matrix_window) for expert in range(start, stop)]
        return torch.stack(experts) if experts else torch.empty(0, *_sizes(matrix_window))
    return _matrix(f"{seed}/{name}", shape, std, window)


def _sizes(window: Window) -> list[int]:
    return [stop - start for start, stop in window]


def _matrix(stream: str, shape: Sequence[int], std: float, window: Window) -> Tensor:
    """`window` of a matrix, whose rows are drawn in blocks of at most BLOCK_NUMBERS, each by its own generator."""
    (start, stop), *other_dimensions = window
    columns = tuple(slice(a, b) for a, b in other_dimensions)
    rows = max(1, BLOCK_NUMBERS // math.prod(shape[1:]))
    blocks = []
    for first in range(start // rows * rows, stop, rows):
        last = min(first + rows, shape[0])
        # The first block has the seed of the name alone, so that weights of one block keep the values of old versions.
        block = _normal(f"{stream}/rows/{first}" if first else stream, (last - first, *shape[1:]), std)
        blocks.append(block[(slice(max(start - first, 0), min(stop, last) - first), *columns)].clone())
    return torch.cat(blocks) if blocks else torch.empty(_sizes(window))


def _normal(stream: str, shape: Sequence[int], std: float) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed(stream))
    return torch.empty(*shape).normal_(0, std, generator=generator)


def stream_seed(stream: str) -> int:
    """A 63-bit seed that depends on every character of `stream`."""
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little") >> 1


def sequence_keys(seed: int, step: int, index: Tensor) -> Tensor:
    """The random keys int64 (B,) of the sequences `index` (B,) of the global batch of `step`."""
    return fold(index.to(torch.int64), stream_seed(f"{seed}/{step}"))


def site_keys(keys: Tensor, n_layers: int) -> Tensor:
    """Sequence keys (B,) -> the keys (n_layers + 1, SITES, B) of all sites.

    Index 0 is the embedding, i + 1 is block i. The keys are computed together, because a single key takes a dozen
    operations on B numbers.
    """
    layers = torch.arange(1, n_layers + 1, device=keys.device)[:, None]
    layer_keys = torch.cat([keys[None], fold(keys, layers)])  # (n_layers + 1, B)
    return fold(layer_keys[:, None], torch.arange(SITES, device=keys.device)[:, None])


def fold(keys: Tensor, number: int | Tensor) -> Tensor:
    """New keys (B,) that depend on every bit of `keys` (B,) and of `number` (the finalizer of splitmix64)."""
    x = keys * -0x61C8864680B583EB + (number & 0x7FFFFFFFFFFFFFFF)
    x = (x ^ _shift64(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift64(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift64(x, 31)


def dropout(x: Tensor, p: float, keys: Tensor | None) -> Tensor:
    """Dropout of `x` (B, ...) by the keys (B,) of a site; without keys `x` is returned unchanged.

    The probability is p rounded to 1/256.
    """
    threshold = round(p * 256)
    if keys is None or threshold == 0:
        return x
    random = random_bytes(keys, math.prod(x.shape[1:])).view(x.shape)
    return x.masked_fill(random < threshold, 0.0) * (256 / (256 - threshold))


def normal(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers, fp32 (B, count), a function of key and index alone (Box-Muller transform)."""
    bits = random_bytes(keys, 8 * count).contiguous().view(torch.int32)  # (B, 2 count)
    u, v = ((bits >> 8) & 0xFFFFFF).float().add(0.5).mul(2.0**-24).chunk(2, dim=-1)  # inside (0, 1)
    return (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()


def random_bytes(keys: Tensor, count: int) -> Tensor:
    """uint8 (B, count), a function of key and index alone. Compiled, they are int32 numbers from 0 to 255."""
    low = keys.to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]

    def words(index: Tensor) -> Tensor:
        # Both halves of the key are mixed in, one after the other. One mix would give sequences with similar keys the
        # same bytes at shifted indices.
        return _mix32(_mix32(index ^ low) + high)

    if torch.compiler.is_compiling():  # a kernel cannot view words as bytes: each byte computes its word, and shifts it
        index = torch.arange(count, dtype=torch.int32, device=keys.device)
        return (words(index >> 2) >> ((index & 3) << 3)) & 0xFF
    n_words = -(-count // 4)
    return words(torch.arange(n_words, dtype=torch.int32, device=keys.device)).view(torch.uint8)[:, :count]


def _mix32(x: Tensor) -> Tensor:
    """The finalizer of murmur3: every bit of the result depends on every bit of x (int32)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -0x7A143595
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return x ^ ((x >> 16) & 0xFFFF)


def _shift64(x: Tensor, bits: int) -> Tensor:
    """x >> bits without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
