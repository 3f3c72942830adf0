"""The bytes of a checkpoint: any box of any tensor can be read back, and damage is found."""

import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainer.checkpoint import block_io, layout
from trainer.checkpoint.block_io import PAGE_BYTES, Damaged
from trainer.startup import page_lock_note

DTYPES = list(layout.DTYPES.values())


@contextmanager
def small_blocks():
    """Blocks of one page, so that files of few bytes have many blocks."""
    with (
        mock.patch.multiple(block_io, BLOCK_BYTES=PAGE_BYTES),
        mock.patch.multiple(layout, BLOCK_BYTES=PAGE_BYTES, WINDOW_BLOCKS=2),
    ):
        yield


def random_tensor(shape, dtype, seed=0):
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


shapes = st.lists(st.sampled_from([1, 2, 3, 7, 20, 50]), max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6), st.booleans())
def test_tensors_are_read_back_also_by_safetensors(tmp_path_factory, made, staged):
    folder: Path = tmp_path_factory.mktemp("s")
    tensors = {f"t{i}": random_tensor(shape, dtype, i) for i, (shape, dtype) in enumerate(made)}
    with small_blocks():
        plan = layout.make_plan(tensors, None)
        source = layout.ShardSource(plan, tensors)
        if staged:
            source = layout.StagingBuffer(source)
            source.start()
            source.wait()
        name = layout.file_name(0)
        checksums = block_io.write(folder / name, plan.size, source.block)
        loaded = {key: torch.zeros_like(t) for key, t in tensors.items()}
        layout.read(folder, {name: checksums}, plan.table, loaded)
    assert len(checksums["crc32"]) == -(-checksums["size"] // PAGE_BYTES)
    assert checksums["size"] == (folder / name).stat().st_size
    by_library = load_file(folder / name)
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor) and torch.equal(by_library[key], tensor), key
    assert set(by_library) == set(tensors)


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    offsets = [draw(st.integers(0, n - 1)) for n in shape]
    lengths = [draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)]
    return shape, offsets, lengths, draw(st.integers(0, 9))


@settings(max_examples=60, deadline=None)
@given(boxes(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_box_of_a_stored_part_can_be_read(tmp_path_factory, box, dtype):
    """As another mesh needs it: into a target that is itself a box, cut into regions of at most a block."""
    shape, offsets, lengths, size_before = box
    folder = tmp_path_factory.mktemp("b")
    tensors = {
        "a": random_tensor([size_before], dtype, 1),
        "b": random_tensor(shape, dtype, 2),
        "c": random_tensor([3], dtype, 3),
    }
    with small_blocks():
        plan = layout.make_plan(tensors, None)
        path = folder / layout.file_name(0)
        checksums = block_io.write(path, plan.size, layout.ShardSource(plan, tensors).block)
        _, start, _, _ = plan.table["b"]["parts"][0]
        surroundings = torch.zeros([n + 2 for n in lengths], dtype=dtype)
        target = surroundings[tuple(slice(1, n + 1) for n in lengths)]
        regions = list(layout._regions(start, shape, offsets, target, dtype))
        assert all(region.stop - region.start <= PAGE_BYTES for region in regions)
        content = path.read_bytes()
        for region in regions:
            part = torch.frombuffer(bytearray(content[region.start : region.stop]), dtype=dtype)
            region.target.copy_(part.as_strided(region.target.shape, region.strides))
        windows = list(layout._windows(sorted(regions, key=lambda region: region.start)))
    assert torch.equal(target, tensors["b"][tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))])
    assert int((surroundings != 0).sum()) == int((target != 0).sum())
    assert sum(map(len, windows)) == len(regions) and len(checksums["crc32"]) == -(-len(content) // PAGE_BYTES)


@pytest.mark.parametrize("direct", [True, False])
def test_files_are_written_with_and_without_direct_access(tmp_path, monkeypatch, direct):
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    content = os.urandom(3 * PAGE_BYTES + 5)
    checksums = block_io.write_bytes(tmp_path / "f", content)
    assert (tmp_path / "f").read_bytes() == content == block_io.read_bytes(tmp_path / "f", checksums)


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "missing", "folder"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "f"
    checksums = block_io.write_bytes(path, bytes(5000))
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
        block_io.read_bytes(path, checksums)


def test_changes_after_staging_are_not_saved(tmp_path):
    """`wait` copies the blocks that the writer had not copied yet."""
    tensors = {f"t{i}": torch.full((5, 700), float(i)) for i in range(9)}
    with small_blocks():
        plan = layout.make_plan(tensors, None)
        staging = layout.StagingBuffer(layout.ShardSource(plan, tensors))
        for number in range(2):  # the second save overwrites the buffer of the first
            staging.start()
            staging.wait()
            for tensor in tensors.values():
                tensor += 1
            staging.finish()
            block_io.write(tmp_path / "f", plan.size, staging.block)
            for i, key in enumerate(tensors):
                assert bool((load_file(tmp_path / "f")[key] == i + number).all())


class RefusesToLock:
    """The object that torch.cuda.cudart() returns, on a machine that page-locks at most 100 bytes."""

    class cudaError(int):
        success = 0

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:
        return 0 if size <= 100 else 304

    @staticmethod
    def cudaGetErrorString(code: int) -> str:
        return "OS call failed or operation not supported on this OS"


def test_memory_that_cannot_be_page_locked_is_reported(monkeypatch):
    """And it is used all the same."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: RefusesToLock)
    monkeypatch.setattr(torch.cuda, "_cudart", RefusesToLock)
    kernels = []  # the first kernel after a failure raises it

    def first_kernel(size, device):
        kernels.append(device)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "ones", first_kernel)
    cpu = torch.device("cpu")
    assert layout.lock_pages(torch.empty(100, dtype=torch.uint8), cpu) is None and not kernels
    error = layout.lock_pages(torch.empty(101, dtype=torch.uint8), cpu)
    assert error == "OS call failed or operation not supported on this OS (304)" and kernels == [cpu]
    assert page_lock_note([None, None]) is None
    note = page_lock_note([None, error])
    assert "the staging memory of 1 of 2 ranks could not be page-locked (OS call failed" in note
