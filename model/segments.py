"""Attention within segments of the sequences: chunks, documents, or documents that are cut into chunks.

A segment is a run of tokens of one sequence. A token sees itself and the tokens before it in its segment, and nothing
else.
The borders of segments are the same for all layers of a kind, so they are computed once for each forward.

Letters: B batch, S sequence, T = B*S tokens, H query heads, KV key and value heads, P padded indices, N segments of a
group, L their padded length.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.permute import pad_segments, unpad_segments

# A segment joins a group if its length is at least MIN_LENGTH_RATIO times the longest of the group, or at most
# MAX_PADDING_TOKENS less. This limits the padding of a group.
MIN_LENGTH_RATIO = 0.8
MAX_PADDING_TOKENS = 16

# q (N, H, L, head_dim), k and v (N, KV, L, head_dim); mask (N, 1, L, L) or causal=True -> (N, H, L, head_dim)
FusedAttention = Callable[..., Tensor]


class AttentionMask(Protocol):
    """Attention in which tokens do not see their whole sequence up to themselves."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: FusedAttention) -> Tensor:
        """q (B, S, H, head_dim), k and v (B, S, KV, head_dim) -> (B, S, H, head_dim)."""


def attention_masks(
    config: ModelConfig, positions: Tensor, documents: Tensor | None, x: Tensor, dropout: bool
) -> tuple[AttentionMask | None, AttentionMask | None]:
    """The masks of NoPE layers and of RoPE layers; None: a token sees the whole row up to itself.

    positions and documents are as in `document_masks`, x and dropout as in `segment_mask`.
    """
    batch, length = x.shape[:2]
    chunk = config.attention_chunk
    if documents is not None:
        return document_masks(documents, positions, chunk, x, dropout)
    if chunk is not None and chunk < length:
        return None, chunk_mask(batch, length, chunk, x.device)
    return None, None


def chunk_mask(batch: int, length: int, chunk: int, device: torch.device) -> AttentionMask:
    """The mask of sequences (batch, length), each one document, that are cut into chunks of `chunk` tokens."""
    starts = torch.arange(length) % chunk == 0
    return SegmentGroups(starts.expand(batch, -1), device)


def document_masks(
    documents: Tensor, positions: Tensor, chunk: int | None, x: Tensor, dropout: bool
) -> tuple[AttentionMask, AttentionMask]:
    """The masks of NoPE layers and of RoPE layers, for documents (B, S) that are cut into chunks on RoPE layers.

    positions (B or 1, S) count within each document. x and dropout are as in `segment_mask`.
    """
    starts = _changes(documents)
    full = segment_mask(starts, x, dropout)
    if chunk is None:
        return full, full
    return full, segment_mask(starts | _changes(positions // chunk), x, dropout)


def segment_mask(starts: Tensor, x: Tensor, dropout: bool) -> AttentionMask:
    """The mask of segments that begin at starts (B, S), for activations like x. FlexAttention has no dropout."""
    use_flex = not dropout and x.dtype != torch.float64 and flex_available(x.device)
    return FlexSegments(starts) if use_flex else SegmentGroups(starts, x.device)


def _changes(x: Tensor) -> Tensor:
    """x (B, S) -> whether each number differs from the one before it; True for the first of a sequence."""
    return F.pad(x[:, 1:] != x[:, :-1], (1, 0), value=True)


@functools.cache
def flex_available(device: torch.device) -> bool:
    """Whether FlexAttention can be compiled for a device."""
    return flex_supported(device) and triton_lacks() is None


def flex_supported(device: torch.device) -> bool:
    """Whether this device should use FlexAttention, if it can be compiled."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def c_compiler() -> str | None:
    """The C compiler that Triton runs (triton/runtime/build.py): CC if it is set, else gcc, else clang."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next((name for name in names if shutil.which(name)), None)


def triton_lacks() -> str | None:
    """What Triton needs to start its kernels and does not find on this machine, in words; None if nothing is missing.

    Triton compiles a C module at its first kernel, which would otherwise fail in the first step.
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


class SegmentGroups:
    """Causal attention of groups of segments: segments of similar lengths become one batch, without a mask.

    Shorter segments are padded at their end, where causal attention hides the padding from every token. A padded index
    counts the tokens and the padding of all groups.

    Attributes:
        shapes: the number of segments of each group, and their padded length.
        token_at: (P,) the token at each padded index; None if padded indices are the tokens in their order.
        padded_index: (T,) the padded index of each token; None in the same case.
        padding: the padded indices without a token; None if there are none.
    """

    def __init__(self, starts: Tensor, device: torch.device) -> None:
        """starts (B, S) bool: whether a segment begins at a token, which must be True for the first token of a
        sequence.

        Waits for the device that holds `starts`.
        """
        first = starts.flatten().nonzero()[:, 0].cpu()  # the first token of each segment, counted over all sequences
        lengths, order = first.diff(append=torch.tensor([starts.numel()])).sort(descending=True, stable=True)
        first = first[order]
        self.shapes = _group_lengths(lengths.tolist())
        self.token_at: Tensor | None = None
        self.padded_index: Tensor | None = None
        self.padding: Tensor | None = None
        tokens, filled = [], []
        begin = 0
        for count, length in self.shapes:
            group = slice(begin, begin + count)
            within = torch.arange(length)
            is_token = within < lengths[group, None]
            tokens.append((first[group, None] + within * is_token).flatten())  # padding repeats the first token
            filled.append(is_token.flatten())
            begin += count
        token_at, is_filled = torch.cat(tokens), torch.cat(filled)
        filled_indices = is_filled.nonzero()[:, 0]
        has_padding = len(filled_indices) < len(token_at)
        if len(self.shapes) > 1 or has_padding:
            padded_index = torch.empty(starts.numel(), dtype=torch.int64)
            padded_index[token_at[filled_indices]] = filled_indices
            self.token_at, self.padded_index = token_at.to(device), padded_index.to(device)
            if has_padding:
                self.padding = (~is_filled).nonzero()[:, 0].to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: FusedAttention) -> Tensor:
        shape = q.shape
        qkv = [t.flatten(0, 1) for t in (q, k, v)]
        if self.token_at is not None and self.padded_index is not None:
            qkv = [pad_segments(t, self.token_at, self.padded_index) for t in qkv]
        sizes = [count * length for count, length in self.shapes]
        outs = []
        for (count, length), *group in zip(self.shapes, *(t.split(sizes) for t in qkv), strict=True):
            q, k, v = (t.unflatten(0, (count, length)).transpose(1, 2) for t in group)
            outs.append(fused(q, k, v, causal=True).transpose(1, 2).flatten(0, 1))
        if self.token_at is None or self.padded_index is None:
            return outs[0].view(shape)
        return unpad_segments(outs, self.token_at, self.padded_index, self.padding).view(shape)


def _group_lengths(lengths: list[int]) -> list[tuple[int, int]]:
    """Lengths of segments, longest first -> (number of segments, the longest) of each group of similar lengths."""
    groups: list[tuple[int, int]] = []
    for length in lengths:
        if groups:
            count, longest = groups[-1]
            if length >= min(MIN_LENGTH_RATIO * longest, longest - MAX_PADDING_TOKENS):
                groups[-1] = (count + 1, longest)
                continue
        groups.append((1, length))
    return groups


class FlexSegments:
    """FlexAttention (arXiv:2412.05496) with a block mask, compiled at its first use; used on CUDA.

    Written after its documentation. Tests compare its results on a CPU without compilation; it has never run on a GPU.
    """

    def __init__(self, starts: Tensor) -> None:
        """starts (B, S) bool, as for `SegmentGroups`. The host does not wait for the device."""
        segment = starts.cumsum(1)  # the number of each token's segment, (B, S)

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (segment[b, query] == segment[b, key])

        batch, length = starts.shape
        create_block_mask, self.flex_attention = _flex_functions()
        self.block_mask = create_block_mask(sees, batch, None, length, length, device=starts.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: FusedAttention) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.flex_attention(q, k, v, block_mask=self.block_mask, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def _flex_functions() -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """create_block_mask and flex_attention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(create_block_mask), torch.compile(flex_attention)
