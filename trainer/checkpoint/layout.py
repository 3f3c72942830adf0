"""Tensors in files and back: safetensors in logical shapes.

torch.distributed.checkpoint plans which rank writes which part of a tensor, and which stored parts a rank needs for its
own, so that what any mesh wrote any other can read; `blocks.py` moves the bytes.
1. `make_plan`: once a run. Each rank writes one file: a header, weights, and the optimizer's state.
2. `ShardSource` gives the bytes of that file out of the live tensors: a save streams them, or stages them in a
   `StagingBuffer`.
3. `read`: the blocks that a rank needs are read, checked, and copied into its tensors.
"""

import json
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
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem

from parallel import collectives
from parallel.fsdp import to_local
from trainer.checkpoint import block_io
from trainer.checkpoint.block_io import BLOCK, Buffers, Damaged, Record, WorkItems

WINDOW = 8  # blocks that are read at once
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Table = dict[str, Any]  # tensor -> its dtype, shape, and parts: rank of the file, first byte there, place, shape


@dataclass
class Plan:
    """What this rank writes: the header of its file, where in it each tensor begins, and its size."""

    header: bytes
    begins: dict[str, int]
    size: int
    table: Table  # all files; on rank 0, for the manifest


def file_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def make_plan(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Plan:
    """Deal tensors out over the ranks, what several hold to one of them. On all ranks together."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=collectives.rank() == 0)
    plan = planner.create_local_plan()
    plan = replace(plan, items=[item for item in plan.items if prod(_part(item).chunk.sizes)])
    plans: list[SavePlan] = collectives.gather(plan, group)
    table: Table = {}
    if collectives.rank() == 0:
        plans, _ = planner.create_global_plan(plans)
        for number, each in enumerate(plans):
            _note(table, number, each.items)
    return Plan(*_layout(collectives.scatter(plans, group).items), table)


def _part(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _layout(items: Sequence[WriteItem]) -> tuple[bytes, dict[str, int], int]:
    """Header, beginnings and size of a file. No element lies across the border of two blocks."""

    def order(item: WriteItem) -> tuple[int, bool]:
        return -_part(item).properties.dtype.itemsize, item.index.fqn.startswith("optim.")

    entries: dict[str, Any] = {}
    end = 0
    for item in sorted(items, key=order):
        dtype, shape, begin = _part(item).properties.dtype, list(_part(item).chunk.sizes), end
        end += prod(shape) * dtype.itemsize
        entries[item.index.fqn] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + e["data_offsets"][0] for name, e in entries.items()}, len(header) + end


def _note(table: Table, rank: int, items: Sequence[WriteItem]) -> None:
    _, begins, _ = _layout(items)
    for item in items:
        part, name = _part(item), item.index.fqn
        whole = {"dtype": NAMES[part.properties.dtype], "shape": list(part.size), "parts": []}
        here = [rank, begins[name], list(part.chunk.offsets), list(part.chunk.sizes)]
        table.setdefault(name, whole)["parts"].append(here)


class ShardSource:
    """The bytes of this rank's file, out of its tensors as they are at the moment."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        self.size = plan.size
        self._begins = [0, *plan.begins.values()]
        self._parts = [torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)]
        for name in plan.begins:
            part = to_local(tensors[name])
            assert part.is_contiguous(), name  # else its bytes would be those of a copy
            self._parts.append(part.reshape(-1).view(torch.uint8))
        self.device = self._parts[-1].device
        self._buffers = Buffers()

    def copy(self, start: int, out: Tensor) -> None:
        """Bytes from `start` on into `out`; what is beyond the end stays."""
        stop, at = min(start + len(out), self.size), start
        number = bisect_right(self._begins, start) - 1
        while at < stop:
            begin, part = self._begins[number], self._parts[number]
            until = min(stop, begin + len(part))
            to, part = out[at - start : until - start], part[at - begin : until - begin]
            if part.device.type == "cpu":  # torch would start a team of threads for each that copies
                np.copyto(to.numpy(), part.numpy())
            else:
                to.copy_(part, non_blocking=True)
            at, number = until, number + 1

    def block(self, start: int) -> memoryview:
        """A block, in a buffer of the thread that asks, until it asks again."""
        buffer = self._buffers.get()
        self.copy(start, torch.frombuffer(buffer, dtype=torch.uint8))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return memoryview(buffer)[: block_io.whole_pages(min(BLOCK, self.size - start))]


def lock_pages(memory: Tensor, device: torch.device) -> str | None:
    """Page-lock host memory, so that copies from the device run beside its kernels. Returns why that failed, or None.

    Containers, WSL and sandboxes may refuse it. CUDA also keeps a failure as its last error, and the next kernel that
    torch launches would raise it: so one is launched here, which raises it and thereby clears it.
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
    """A staged copy of a source, in memory that serves every save; its pages are touched here, and locked for CUDA.

    After `begin` nothing may change a tensor until `end`. What does not, a forward and a backward, can run between
    them, and meanwhile the writer's thread copies, by `help`; `end` copies what is left.
    """

    def __init__(self, source: ShardSource) -> None:
        self.source = source
        self._memory = block_io.pages(source.size)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8).zero_()
        self._copies = WorkItems(self._copy)
        self._stream = None
        self.not_locked: str | None = None  # why the memory could not be locked
        if source.device.type == "cuda":
            self.not_locked = lock_pages(self._bytes, source.device)
            self._stream = torch.cuda.Stream(source.device)

    def begin(self) -> None:
        if self._stream is None:
            self._copies = WorkItems(self._copy, range(0, self.source.size, BLOCK))
        else:  # behind the kernels that are under way
            self._stream.wait_stream(torch.cuda.current_stream(self.source.device))
            with torch.cuda.stream(self._stream):
                self.source.copy(0, self._bytes)

    def help(self) -> None:
        """Returns when all is copied."""
        if self._stream is None:
            self._copies.finish()
        else:
            self._stream.synchronize()

    def end(self) -> None:
        if self._stream is None:
            self._copies.finish()
        else:
            torch.cuda.current_stream(self.source.device).wait_stream(self._stream)

    def _copy(self, start: int) -> None:
        self.source.copy(start, self._bytes[start : start + BLOCK])

    def block(self, start: int) -> memoryview:
        return memoryview(self._memory)[start : start + BLOCK]


@dataclass
class Region:
    """A box of a stored part that spans no more bytes than a block has, and the tensor it goes to."""

    first: int  # byte of the file
    stop: int
    dtype: torch.dtype
    strides: tuple[int, ...]  # of the part, in elements
    to: Tensor


def read(folder: Path, files: Mapping[str, Record], table: Table, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place from files that any number of ranks wrote. Each byte is checked before it is used.

    Raises Damaged on the first file or block that is not what was written.
    """
    jobs = []
    for rank, regions in _needed(table, tensors).items():
        name = file_name(rank)
        if name not in files:
            raise Damaged(f"{name} is not in the manifest")
        block_io.check_file(folder / name, files[name])
        jobs += [(name, window) for window in _windows(sorted(regions, key=lambda region: region.first))]
    buffers = Buffers(WINDOW * BLOCK)

    def fill(job: tuple[str, list[Region]]) -> None:
        name, window = job
        first, stop = window[0].first // BLOCK, -(-max(region.stop for region in window) // BLOCK)
        block_io.read(folder / name, files[name], first, stop, buffers.get())
        content = torch.frombuffer(buffers.get(), dtype=torch.uint8)
        for region in window:
            part = content[region.first - first * BLOCK : region.stop - first * BLOCK].view(region.dtype)
            region.to.copy_(part.as_strided(region.to.shape, region.strides))

    batch = WorkItems(fill, jobs)
    with ThreadPoolExecutor(1) as helper:
        helper.submit(batch.finish)
        batch.finish()


def _needed(table: Table, tensors: Mapping[str, Tensor]) -> dict[int, list[Region]]:
    """What this rank needs of the file of each rank."""
    metadata = Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(DTYPES[stored["dtype"]]),
                torch.Size(stored["shape"]),
                [ChunkStorageMetadata(torch.Size(place), torch.Size(shape)) for _, _, place, shape in stored["parts"]],
            )
            for name, stored in table.items()
            if name in tensors
        }
    )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata)
    needed: dict[int, list[Region]] = {}
    for item in planner.create_local_plan().items:
        stored, number = table[item.storage_index.fqn], item.storage_index.index
        assert number is not None
        rank, begin, _, shape = stored["parts"][number]
        to = planner.resolve_tensor(item).detach()
        regions = _regions(begin, shape, item.storage_offsets, to, DTYPES[stored["dtype"]])
        needed.setdefault(rank, []).extend(regions)
    return needed


def _regions(
    begin: int, shape: Sequence[int], offsets: Sequence[int], to: Tensor, dtype: torch.dtype
) -> Iterator[Region]:
    """The box at `offsets` of a stored part of `shape`, which begins at byte `begin`, cut into regions."""
    if not to.numel():
        return
    strides = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
    first = begin + dtype.itemsize * sum(o * s for o, s in zip(offsets, strides, strict=True))
    span = dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(to.shape, strides, strict=True)))
    if span <= BLOCK:
        yield Region(first, first + span, dtype, strides, to)
        return
    dim = next(d for d, n in enumerate(to.shape) if n > 1)
    step = max(1, to.shape[dim] * BLOCK // span)
    for at in range(0, to.shape[dim], step):
        inside = [o + (at if d == dim else 0) for d, o in enumerate(offsets)]
        yield from _regions(begin, shape, inside, to.narrow(dim, at, min(step, to.shape[dim] - at)), dtype)


def _windows(regions: Sequence[Region]) -> Iterator[list[Region]]:
    """Slabs, which are in order, by windows of at most WINDOW blocks."""
    window: list[Region] = []
    stop = 0
    for region in regions:
        stop = max(stop, region.stop)
        if window and -(-stop // BLOCK) - window[0].first // BLOCK > WINDOW:
            yield window
            window, stop = [], region.stop
        window.append(region)
    if window:
        yield window
