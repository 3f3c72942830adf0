"""The header of a safetensors file, which checkpoint and export write themselves."""

import torch
from safetensors import safe_open

from trainer.safetensors_header import TensorEntry, make_header

ENTRIES = [
    TensorEntry("a", torch.bfloat16, (3,)),
    TensorEntry("b", torch.float32, (2, 2)),
    TensorEntry("c", torch.int64, ()),
    TensorEntry("d", torch.float32, (0,)),
]


def test_wide_dtypes_come_first_and_the_data_is_aligned(tmp_path):
    for alignment in (8, 64):
        header = make_header(ENTRIES, alignment)
        start = len(header.content)
        assert start % alignment == 0
        assert header.starts == {"c": start, "b": start + 8, "d": start + 24, "a": start + 24}
        assert header.size == start + 30
        path = tmp_path / f"{alignment}.safetensors"
        path.write_bytes(header.content + bytes(header.size - start))
        with safe_open(path, framework="pt") as file:
            for name, dtype, shape in ENTRIES:
                assert file.get_tensor(name).dtype == dtype and file.get_tensor(name).shape == shape


def test_the_header_is_that_of_earlier_versions():
    text = b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    for alignment in (8, 64):
        header = make_header([TensorEntry("b", torch.float32, (2, 2))], alignment)
        padded = text + b" " * (-(8 + len(text)) % alignment)
        assert header.content == len(padded).to_bytes(8, "little") + padded
