"""Attention within segments of the rows: chunks, documents, or documents cut into chunks.

A segment is a stretch of a row in which a token sees itself and what is before it, and nothing outside. Where the
segments lie is the same for all layers of a kind, so it is worked out once a forward.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

SLACK = 16  # tokens by which the segments of a group may differ in length,
SHARE = 0.8  # or the shortest's share of the longest: fillers are at most that much of a group

Fused = Callable[..., Tensor]  # q (N, H, L, head_dim), k, v (N, KV, L, head_dim) -> (N, H, L, head_dim)


class Past(Protocol):
    """What the tokens of a forward see, where that is not the whole row before them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: Fused) -> Tensor:
        """q (B, S, H, head_dim), k, v (B, S, KV, head_dim) -> (B, S, H, head_dim)."""


def segmented(starts: Tensor, x: Tensor, dropout: bool) -> Past:
    """Segments that begin at starts (B, S), for activations like x; FlexAttention has no `dropout`."""
    flex = not dropout and x.dtype != torch.float64 and flex_available(x.device)
    return Flex(starts) if flex else Groups(starts, x.device)


@functools.cache
def flex_available(device: torch.device) -> bool:
    """Whether FlexAttention can be compiled for a device."""
    return flex_supported(device) and triton_lacks() is None


def flex_supported(device: torch.device) -> bool:
    """Whether FlexAttention is what this device should use, if it can be compiled."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def c_compiler() -> str | None:
    """The C compiler that Triton runs (triton/runtime/build.py): CC if it is set, else gcc, else clang."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next((name for name in names if shutil.which(name)), None)


def triton_lacks() -> str | None:
    """What Triton needs to start its kernels and does not find here, in words; None if nothing is missing.

    It compiles a C module that starts them at the first kernel, which would otherwise fail in the first step.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if c_compiler() is None:
        return f"CC={os.environ['CC']}" if "CC" in os.environ else "a C compiler (gcc or clang, or CC=)"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"{headers}/Python.h (a package such as python3-dev)"
    return None


class Groups:
    """Segments of like length become the rows of a batch: causal attention of a group at a time, no mask at all.

    Each token has its slot in one group; the fillers behind shorter segments are behind every real query, too, so that
    no token sees them.
    """

    def __init__(self, starts: Tensor, device: torch.device) -> None:
        """starts (B, S) bool: whether a segment begins at a token; the first of a row always begins one.

        Waits for the device where `starts` lies.
        """
        first = starts.flatten().nonzero()[:, 0].cpu()  # of each segment, its first token among all
        lengths, order = first.diff(append=torch.tensor([starts.numel()])).sort(descending=True, stable=True)
        first = first[order]
        self.shapes = _group(lengths.tolist())  # segments and length of each group
        self.slots: Tensor | None = None  # (P,) the token of each slot, (T,) the slot of each token, and the fillers;
        self.inverse: Tensor | None = None  # all None where slots are the tokens in their order
        self.fillers: Tensor | None = None
        places, real, at = [], [], 0
        for count, length in self.shapes:
            within = torch.arange(length)
            fits = within < lengths[at : at + count, None]
            places.append((first[at : at + count, None] + within * fits).flatten())  # a filler: the segment's first
            real.append(fits.flatten())
            at += count
        slots, taken = torch.cat(places), torch.cat(real).nonzero()[:, 0]
        if len(self.shapes) > 1 or len(taken) < len(slots):
            inverse = torch.empty(starts.numel(), dtype=torch.int64)
            inverse[slots[taken]] = taken
            self.slots, self.inverse = slots.to(device), inverse.to(device)
            if len(taken) < len(slots):
                self.fillers = (~torch.cat(real)).nonzero()[:, 0].to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: Fused) -> Tensor:
        shape, laid = q.shape, [t.flatten(0, 1) for t in (q, k, v)]
        if self.slots is not None:
            laid = [_Lay.apply(t, self.slots, self.inverse) for t in laid]
        sizes = [count * length for count, length in self.shapes]
        outs = []
        for (count, length), *parts in zip(self.shapes, *(t.split(sizes) for t in laid), strict=True):
            q, k, v = (t.unflatten(0, (count, length)).transpose(1, 2) for t in parts)
            outs.append(fused(q, k, v, causal=True).transpose(1, 2).flatten(0, 1))
        if self.slots is None:
            return outs[0].view(shape)
        return _Return.apply(self.slots, self.inverse, self.fillers, *outs).view(shape)


def _group(lengths: list[int]) -> list[tuple[int, int]]:
    """Lengths, longest first -> (how many, the longest) of each group of neighbours that are near enough."""
    groups: list[tuple[int, int]] = []
    for length in lengths:
        count, longest = groups[-1] if groups else (0, 0)
        if length >= min(SHARE * longest, longest - SLACK) and count:
            groups[-1] = (count + 1, longest)
        else:
            groups.append((1, length))
    return groups


class _Lay(torch.autograd.Function):
    """tokens (T, ...) -> slots (P, ...); the gradient is a gather, since a token has one slot."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tokens.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Return(torch.autograd.Function):
    """Groups of slots -> tokens (T, ...); what fillers got is dropped, and their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, inverse: Tensor, fillers: Tensor | None, *groups: Tensor) -> Tensor:
        ctx.save_for_backward(slots, fillers)
        ctx.sizes = [len(group) for group in groups]
        return torch.cat(groups).index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots, fillers = ctx.saved_tensors
        laid = grad.index_select(0, slots)
        if fillers is not None:
            laid.index_fill_(0, fillers, 0)
        return None, None, None, *laid.split(ctx.sizes)


class Flex:
    """FlexAttention (arXiv:2412.05496) with a mask of blocks, compiled at its first use: what CUDA takes.

    Written by its documentation: what it computes is tested uncompiled on a CPU, it has never run on a GPU.
    """

    def __init__(self, starts: Tensor) -> None:
        """starts (B, S) bool, as for `Groups`; nobody waits for the device."""
        number = starts.cumsum(1)  # of the segment, (B, S)

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (number[b, query] == number[b, key])

        batch, length = starts.shape
        make_mask, self.flex = _flex()
        self.mask = make_mask(sees, batch, None, length, length, device=starts.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: Fused) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.flex(q, k, v, block_mask=self.mask, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def _flex() -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(create_block_mask), torch.compile(flex_attention)
