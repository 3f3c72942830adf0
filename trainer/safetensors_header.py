"""The header of a safetensors file: which tensors the file holds, and at which byte each begins.

The checkpoint (`trainer.checkpoint.layout`) and the export to Hugging Face (`trainer.hub.files`) write their data
themselves, block by block, and only need the header. Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

import torch

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


class TensorEntry(NamedTuple):
    """A tensor, or a part of one, that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Header(NamedTuple):
    """The first bytes of a file, the byte of the file at which each tensor begins, and the file's size in bytes."""

    content: bytes
    starts: dict[str, int]
    size: int


def make_header(entries: Iterable[TensorEntry], alignment: int) -> Header:
    """The header of a file that holds `entries` one after the other, without gaps.

    Wide dtypes come first, so that each tensor starts at a multiple of its item size; entries of the same item size
    keep their order. Spaces pad the header, so that the data starts at a multiple of `alignment` bytes.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}  # from the start of the data
    end = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        start = end
        end += prod(shape) * dtype.itemsize
        offsets[name] = start
        fields[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    content = len(text).to_bytes(8, "little") + text
    starts = {name: len(content) + offset for name, offset in offsets.items()}
    return Header(content, starts, len(content) + end)
