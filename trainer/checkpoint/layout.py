"""Which rank writes which bytes of a checkpoint, and which bytes a rank reads back into its tensors.

Files are safetensors, and tensors keep their global shapes. torch.distributed.checkpoint (DCP) plans which rank writes
which chunk of a tensor, and which stored chunks a rank needs for its own: so a checkpoint written on one mesh can be
read on any other. `block_io` reads and writes the bytes.

1. `make_plan` runs once in a run. Each rank writes one file: a header, weights, and the optimizer's state.
2. `ShardSource` returns the bytes of that file from the live tensors. A save writes them to the file block by block, or
   first copies them into a `StagingBuffer`, so that training can continue while the file is written.
3. `read` reads the blocks that a rank needs, verifies them, and copies them into its tensors.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem

from parallel import collectives
from parallel.fsdp import to_local
from trainer.checkpoint import block_io
from trainer.checkpoint.block_io import BLOCK_BYTES, Damaged, FileChecksums, ThreadBuffers, WorkItems
from trainer.safetensors_header import DTYPE_CODES, Header, TensorEntry, make_header

WINDOW_BLOCKS = 8  # read from a file at once
ALIGNMENT_BYTES = 64  # the data of a file starts at a multiple of this
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

# Each tensor's dtype, global shape, and chunks, under the key "parts". A chunk is a list of four: the rank whose file
# holds it, its first byte in that file, its offsets in the tensor, and its shape.
Table = dict[str, Any]


@dataclass
class ShardPlan:
    """The file that this rank writes."""

    header: bytes
    starts: dict[str, int]  # the byte of the file at which each tensor begins
    size: int  # in bytes
    table: Table  # of the files of all ranks, for the manifest; empty except on rank 0


def file_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def make_plan(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> ShardPlan:
    """Divide the tensors between the ranks; one rank writes a chunk that several hold. Called on all ranks together."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=collectives.rank() == 0)
    plan = planner.create_local_plan()
    plan = replace(plan, items=[item for item in plan.items if prod(_write_data(item).chunk.sizes)])
    plans: list[SavePlan] = collectives.gather(plan, group)
    table: Table = {}
    if collectives.rank() == 0:
        plans, _ = planner.create_global_plan(plans)
        for rank, rank_plan in enumerate(plans):
            _add_to_table(table, rank, rank_plan.items)
    header = _header(collectives.scatter(plans, group).items)
    return ShardPlan(header.content, header.starts, header.size, table)


def _write_data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _header(items: Sequence[WriteItem]) -> Header:
    """The header of a file that holds `items`: weights first, then the optimizer's state.

    No element crosses the border between two blocks, because the data is aligned.
    """
    entries = []
    for item in sorted(items, key=lambda item: item.index.fqn.startswith("optim.")):
        data = _write_data(item)
        entries.append(TensorEntry(item.index.fqn, data.properties.dtype, tuple(data.chunk.sizes)))
    return make_header(entries, ALIGNMENT_BYTES)


def _add_to_table(table: Table, rank: int, items: Sequence[WriteItem]) -> None:
    starts = _header(items).starts
    for item in items:
        data, name = _write_data(item), item.index.fqn
        if name not in table:
            table[name] = {"dtype": DTYPE_CODES[data.properties.dtype], "shape": list(data.size), "parts": []}
        table[name]["parts"].append([rank, starts[name], list(data.chunk.offsets), list(data.chunk.sizes)])


class ShardSource:
    """The bytes of this rank's file, read from its tensors as they are at the time of the call."""

    def __init__(self, plan: ShardPlan, tensors: Mapping[str, Tensor]) -> None:
        self.size = plan.size
        self._starts = [0, *plan.starts.values()]
        self._tensors = [torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)]
        for name in plan.starts:
            local = to_local(tensors[name])
            assert local.is_contiguous(), name  # otherwise its bytes would be those of a copy
            self._tensors.append(local.reshape(-1).view(torch.uint8))
        self.device = self._tensors[-1].device
        self._buffers = ThreadBuffers()

    def copy(self, start: int, out: Tensor) -> None:
        """Copy the file's bytes from `start` on into `out`. Bytes of `out` beyond the end of the file are unchanged."""
        position, stop = start, min(start + len(out), self.size)
        number = bisect_right(self._starts, start) - 1
        while position < stop:
            tensor_start, tensor = self._starts[number], self._tensors[number]
            until = min(stop, tensor_start + len(tensor))
            target = out[position - start : until - start]
            source = tensor[position - tensor_start : until - tensor_start]
            if source.device.type == "cpu":  # torch would start a team of threads for each thread that copies
                np.copyto(target.numpy(), source.numpy())
            else:
                target.copy_(source, non_blocking=True)
            position = until
            number += 1

    def block(self, start: int) -> memoryview:
        """The block at `start`. It is in a buffer of the calling thread, which the thread's next call overwrites."""
        buffer = self._buffers.get()
        self.copy(start, torch.frombuffer(buffer, dtype=torch.uint8))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return memoryview(buffer)[: block_io.round_to_pages(min(BLOCK_BYTES, self.size - start))]


def lock_pages(memory: Tensor, device: torch.device) -> str | None:
    """Page-lock host memory, so that copies from the device overlap with its kernels. Returns the error, or None.

    Containers, WSL and sandboxes may refuse it. CUDA also keeps a failure as its last error, and the next kernel that
    torch launches would raise it. Therefore one is launched here, which raises the error and thereby clears it.
    """
    result = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0)
    try:
        torch.cuda.check_error(result)
    except torch.cuda.CudaError as error:
        with suppress(RuntimeError):
            torch.ones(1, device=device)
        return str(error)
    return None


class StagingBuffer:
    """A copy of a ShardSource in host memory, which every save uses again, so that training need not wait for the disk.

    No tensor may change between `start` and the return of `wait`. A forward and a backward change none, so they can run
    while the thread that writes the file copies, in `finish`. `wait` copies the blocks that are not copied yet.
    """

    def __init__(self, source: ShardSource) -> None:
        self.source = source
        self._memory = block_io.allocate_pages(source.size)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8).zero_()  # touches the pages now, not in a save
        self._copies = WorkItems(self._copy_block)
        self._stream = None
        self.page_lock_error: str | None = None  # why the memory could not be page-locked for CUDA
        if source.device.type == "cuda":
            self.page_lock_error = lock_pages(self._bytes, source.device)
            self._stream = torch.cuda.Stream(source.device)

    def start(self) -> None:
        """Start to copy the tensors as they are now."""
        if self._stream is None:
            self._copies = WorkItems(self._copy_block, range(0, self.source.size, BLOCK_BYTES))
        else:  # the copy follows the kernels that are already launched
            self._stream.wait_stream(torch.cuda.current_stream(self.source.device))
            with torch.cuda.stream(self._stream):
                self.source.copy(0, self._bytes)

    def finish(self) -> None:
        """Called by the thread that writes the file: copy, and return when the copy is complete."""
        if self._stream is None:
            self._copies.finish()
        else:
            self._stream.synchronize()

    def wait(self) -> None:
        """Called by the training thread before it changes a tensor. With CUDA the device waits, and not the thread."""
        if self._stream is None:
            self._copies.finish()
        else:
            torch.cuda.current_stream(self.source.device).wait_stream(self._stream)

    def _copy_block(self, start: int) -> None:
        self.source.copy(start, self._bytes[start : start + BLOCK_BYTES])

    def block(self, start: int) -> memoryview:
        return memoryview(self._memory)[start : start + BLOCK_BYTES]


@dataclass
class Region:
    """A box of a stored chunk that spans at most one block's number of bytes, and the tensor to copy it into."""

    start: int  # byte of the file
    stop: int
    dtype: torch.dtype
    strides: tuple[int, ...]  # of the stored chunk, in elements
    target: Tensor


def read(folder: Path, files: Mapping[str, FileChecksums], table: Table, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place from the files of a checkpoint, which any number of ranks wrote.

    Each block is verified before it is used. Raises Damaged for the first file or block that is not as it was written.
    """
    jobs = []
    for rank, regions in _needed_regions(table, tensors).items():
        name = file_name(rank)
        if name not in files:
            raise Damaged(f"{name} is not in the manifest")
        block_io.check_file(folder / name, files[name])
        jobs += [(name, window) for window in _windows(sorted(regions, key=lambda region: region.start))]
    buffers = ThreadBuffers(WINDOW_BLOCKS * BLOCK_BYTES)

    def fill(job: tuple[str, list[Region]]) -> None:
        name, window = job
        first = window[0].start // BLOCK_BYTES
        stop = -(-max(region.stop for region in window) // BLOCK_BYTES)
        block_io.read(folder / name, files[name], first, stop, buffers.get())
        content = torch.frombuffer(buffers.get(), dtype=torch.uint8)
        base = first * BLOCK_BYTES
        for region in window:
            elements = content[region.start - base : region.stop - base].view(region.dtype)
            region.target.copy_(elements.as_strided(region.target.shape, region.strides))

    work = WorkItems(fill, jobs)
    with ThreadPoolExecutor(1) as helper:
        helper.submit(work.finish)
        work.finish()


def _needed_regions(table: Table, tensors: Mapping[str, Tensor]) -> dict[int, list[Region]]:
    """The regions that this rank needs, by the rank whose file holds them."""
    metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, stored in table.items():
        if name in tensors:
            chunks = [
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)) for _, _, offsets, shape in stored["parts"]
            ]
            properties = TensorProperties(DTYPES[stored["dtype"]])
            metadata[name] = TensorStorageMetadata(properties, torch.Size(stored["shape"]), chunks)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), Metadata(metadata))
    needed: dict[int, list[Region]] = {}
    for item in planner.create_local_plan().items:
        stored, number = table[item.storage_index.fqn], item.storage_index.index
        assert number is not None
        rank, start, _, shape = stored["parts"][number]
        target = planner.resolve_tensor(item).detach()
        regions = _regions(start, shape, item.storage_offsets, target, DTYPES[stored["dtype"]])
        needed.setdefault(rank, []).extend(regions)
    return needed


def _regions(
    start: int, shape: Sequence[int], offsets: Sequence[int], target: Tensor, dtype: torch.dtype
) -> Iterator[Region]:
    """Cut a box of a stored chunk into regions of at most BLOCK_BYTES.

    The chunk has `shape` and begins at byte `start` of its file; the box is at `offsets` and has the shape of `target`.
    """
    if not target.numel():
        return
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    first = start + dtype.itemsize * sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    last_element = sum((size - 1) * stride for size, stride in zip(target.shape, strides, strict=True))
    span = dtype.itemsize * (1 + last_element)
    if span <= BLOCK_BYTES:
        yield Region(first, first + span, dtype, strides, target)
        return
    dim = next(dim for dim, size in enumerate(target.shape) if size > 1)
    step = max(1, target.shape[dim] * BLOCK_BYTES // span)
    for position in range(0, target.shape[dim], step):
        inside = list(offsets)
        inside[dim] += position
        length = min(step, target.shape[dim] - position)
        yield from _regions(start, shape, inside, target.narrow(dim, position, length), dtype)


def _windows(regions: Sequence[Region]) -> Iterator[list[Region]]:
    """Group regions, which are sorted by their start, into windows that span at most WINDOW_BLOCKS blocks."""
    window: list[Region] = []
    stop = 0
    for region in regions:
        stop = max(stop, region.stop)
        if window and -(-stop // BLOCK_BYTES) - window[0].start // BLOCK_BYTES > WINDOW_BLOCKS:
            yield window
            window, stop = [], region.stop
        window.append(region)
    if window:
        yield window
