"""Bytes of a checkpoint: any box of any tensor comes back, and nothing that was not written."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainer.checkpoint import block_io, layout
from trainer.checkpoint.block_io import PAGE, Damaged
from trainer.startup import not_locked

DTYPES = list(layout.DTYPES.values())


def small_blocks():
    """Files of many blocks out of few bytes."""
    return mock.patch.multiple(block_io, BLOCK=PAGE), mock.patch.multiple(layout, BLOCK=PAGE, WINDOW=2)


def some(shape, dtype, seed=0):
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


shapes = st.lists(st.sampled_from([1, 2, 3, 7, 20, 50]), max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6), st.booleans())
def test_tensors_come_back_and_the_safetensors_library_reads_them(tmp_path_factory, made, staged):
    folder: Path = tmp_path_factory.mktemp("s")
    tensors = {f"t{i}": some(shape, dtype, i) for i, (shape, dtype) in enumerate(made)}
    bytes_, tensors_ = small_blocks()
    with bytes_, tensors_:
        plan = layout.make_plan(tensors, None)
        source = layout.ShardSource(plan, tensors)
        if staged:
            source = layout.StagingBuffer(source)
            source.begin()
            source.end()
        name = layout.file_name(0)
        record = block_io.write(folder / name, plan.size, source.block)
        back = {key: torch.zeros_like(t) for key, t in tensors.items()}
        layout.read(folder, {name: record}, plan.table, back)
    assert len(record["crc32"]) == -(-record["size"] // PAGE) and record["size"] == (folder / name).stat().st_size
    others = load_file(folder / name)
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor) and torch.equal(others[key], tensor), key
    assert set(others) == set(tensors)


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    offsets = [draw(st.integers(0, n - 1)) for n in shape]
    lengths = [draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)]
    return shape, offsets, lengths, draw(st.integers(0, 9))


@settings(max_examples=60, deadline=None)
@given(boxes(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_box_of_a_stored_part_is_read_and_no_block_beyond_it(tmp_path_factory, box, dtype):
    """What another mesh needs; into a place that is itself a box, with blocks of a few rows."""
    shape, offsets, lengths, before = box
    folder = tmp_path_factory.mktemp("b")
    whole = {"a": some([before], dtype, 1), "b": some(shape, dtype, 2), "c": some([3], dtype, 3)}
    bytes_, tensors_ = small_blocks()
    with bytes_, tensors_:
        plan = layout.make_plan(whole, None)
        record = block_io.write(folder / layout.file_name(0), plan.size, layout.ShardSource(plan, whole).block)
        _, begin, _, _ = plan.table["b"]["parts"][0]
        room = torch.zeros([n + 2 for n in lengths], dtype=dtype)
        to = room[tuple(slice(1, n + 1) for n in lengths)]
        regions = list(layout._regions(begin, shape, offsets, to, dtype))
        assert all(region.stop - region.first <= PAGE for region in regions)
        content = (folder / layout.file_name(0)).read_bytes()
        for region in regions:
            part = torch.frombuffer(bytearray(content[region.first : region.stop]), dtype=dtype)
            region.to.copy_(part.as_strided(region.to.shape, region.strides))
        windows = list(layout._windows(sorted(regions, key=lambda s: s.first)))
    assert torch.equal(to, whole["b"][tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))])
    assert int((room != 0).sum()) == int((to != 0).sum())
    assert sum(map(len, windows)) == len(regions) and len(record["crc32"]) == -(-len(content) // PAGE)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_without_direct_access_is_written_all_the_same(tmp_path, monkeypatch, direct):
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    content = os.urandom(3 * PAGE + 5)
    record = block_io.write_small(tmp_path / "f", content)
    assert (tmp_path / "f").read_bytes() == content == block_io.read_small(tmp_path / "f", record)


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone", "folder"])
def test_what_was_not_written_is_not_read(tmp_path, damage):
    path = tmp_path / "f"
    record = block_io.write_small(path, bytes(5000))
    if damage == "flip":
        path.write_bytes(bytes(4999) + b"\1")
    elif damage == "cut":
        os.truncate(path, 4999)
    elif damage == "longer":
        os.truncate(path, 5001)
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(Damaged, match="^f"):
        block_io.read_small(path, record)


def test_what_changes_after_the_end_of_the_copy_is_not_in_it(tmp_path):
    """And what the writer had not begun to copy by then, the main thread has."""
    tensors = {f"t{i}": torch.full((5, 700), float(i)) for i in range(9)}
    bytes_, tensors_ = small_blocks()
    with bytes_, tensors_:
        plan = layout.make_plan(tensors, None)
        image = layout.StagingBuffer(layout.ShardSource(plan, tensors))
        for number in range(2):  # the second time over the first
            image.begin()
            image.end()
            for tensor in tensors.values():
                tensor += 1
            image.help()
            block_io.write(tmp_path / "f", plan.size, image.block)
            for i, key in enumerate(tensors):
                assert bool((load_file(tmp_path / "f")[key] == i + number).all())


class RefusesToLock:
    """What torch.cuda.cudart() returns, on a machine that page-locks at most 100 bytes."""

    class cudaError(int):
        success = 0

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:
        return 0 if size <= 100 else 304

    @staticmethod
    def cudaGetErrorString(code: int) -> str:
        return "OS call failed or operation not supported on this OS"


def test_memory_that_cannot_be_page_locked_is_reported_and_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: RefusesToLock)
    monkeypatch.setattr(torch.cuda, "_cudart", RefusesToLock)
    kernels = []  # the first kernel after a failure raises it

    def first_kernel(size, device):
        kernels.append(device)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "ones", first_kernel)
    cpu = torch.device("cpu")
    assert layout.lock_pages(torch.empty(100, dtype=torch.uint8), cpu) is None and not kernels
    why = layout.lock_pages(torch.empty(101, dtype=torch.uint8), cpu)
    assert why == "OS call failed or operation not supported on this OS (304)" and kernels == [cpu]
    assert not_locked([None, None]) is None
    assert "the staging memory of 1 of 2 ranks could not be page-locked (OS call failed" in not_locked([None, why])
