"""Writes and reads the files of a checkpoint in blocks, each with a checksum. It knows bytes, but no tensors.

Where the file system allows it, blocks bypass the page cache (O_DIRECT). That needs a tenth of the CPU time of buffered
I/O, leaves the corpus in the cache, and makes the check after a write read from the disk instead of from memory.
"""

import errno
import mmap
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

BLOCK_BYTES = 1 << 24  # covered by one checksum, and requested from the file system at once
PAGE_BYTES = 4096  # O_DIRECT needs offsets and lengths that are multiples of this


class FileChecksums(TypedDict):
    """What a checkpoint's manifest holds about each of its files."""

    size: int  # in bytes
    crc32: list[int]  # of each block


class Damaged(Exception):
    """Bytes of a checkpoint are missing, or are not those that were written. The message names file and block."""


class ThreadBuffers:
    """One page-aligned buffer of `size` bytes for each thread that calls `get`."""

    def __init__(self, size: int = BLOCK_BYTES) -> None:
        self.size = size
        self._of_thread = threading.local()

    def get(self) -> mmap.mmap:
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = allocate_pages(self.size)
        buffer: mmap.mmap = self._of_thread.buffer
        return buffer


def allocate_pages(size: int) -> mmap.mmap:
    """Page-aligned memory for at least `size` bytes."""
    memory = mmap.mmap(-1, round_to_pages(size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def round_to_pages(size: int) -> int:
    """`size` rounded up to a multiple of PAGE_BYTES."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


class WorkItems:
    """Calls of one function on a list of items. Any number of threads share the work: each of them calls `finish`."""

    def __init__(self, call: Callable[..., Any], *items: Iterable[Any]) -> None:
        self._call = call
        self._not_started = deque(enumerate(zip(*items, strict=True)))
        self._results: list[Any] = [None] * len(self._not_started)
        self._running = 0
        self._changed = threading.Condition()
        self._error: Exception | None = None

    def finish(self) -> list[Any]:
        """Call the function on items that no thread has started, and wait for those that other threads have.

        Returns the results in the order of the items. Raises the first error of any call, on every thread.
        """
        while True:
            with self._changed:
                if not self._not_started:
                    self._changed.wait_for(lambda: not self._running)
                    if self._error is not None:
                        raise self._error
                    return self._results
                number, item = self._not_started.popleft()
                self._running += 1
            try:
                self._results[number] = self._call(*item)
            except Exception as error:
                if self._error is None:
                    self._error = error
                self._not_started.clear()
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()


class WorkQueue:
    """Runs batches of calls one after the other on one thread. Other threads may `help` with the current batch."""

    _batch: WorkItems | None = None
    _cancelled = False

    def run(self, call: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
        """`list(map(call, *items))`. Raises InterruptedError, which is an OSError, soon after `cancel`."""

        def call_unless_cancelled(*item: Any) -> Any:
            if self._cancelled:
                raise InterruptedError("the save was cancelled")
            return call(*item)

        self._batch = WorkItems(call_unless_cancelled, *items)
        return self._batch.finish()

    def cancel(self) -> None:
        self._cancelled = True

    def help(self, until: Future[Any]) -> None:
        """Work on the batches that another thread runs, until `until` is done."""
        while not until.done():
            if self._batch is not None:
                with suppress(Exception):  # the thread that runs the batch gets the same error
                    self._batch.finish()
            wait([until], timeout=0.01)  # the next batch may not have started yet


def write(path: Path, size: int, block: Callable[[int], memoryview], queue: WorkQueue | None = None) -> FileChecksums:
    """Write a file of `size` bytes, flush it to the disk, read it back, and compare.

    `block(start)` returns the file's bytes from `start` on: up to BLOCK_BYTES of them, padded to whole pages. It is
    called twice for each block, to write and to compare. Raises OSError, for example if the disk is full, and Damaged
    if the disk returns other bytes than were written.
    """
    if queue is None:
        queue = WorkQueue()
    starts = range(0, size, BLOCK_BYTES)
    buffers = ThreadBuffers()
    handle, direct = _open_new(path, size)

    def write_block(start: int) -> int:
        content = block(start)
        end = min(BLOCK_BYTES, size - start)
        written = 0
        while written < end:
            remaining = content[written : round_to_pages(end) if direct else end]  # O_DIRECT writes whole pages only
            written += os.pwrite(handle, remaining, start + written)
        return zlib.crc32(content[:end])

    def compare_block(start: int) -> None:
        end = min(BLOCK_BYTES, size - start)
        stored = _fill(handle, buffers.get(), end, start, direct)
        if not _equal(stored, block(start)[:end]):
            raise Damaged(f"{path.name}: the disk returned other bytes than were written at byte {start:,}")

    try:
        checksums = queue.run(write_block, starts)
        os.ftruncate(handle, size)
        os.fsync(handle)
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        queue.run(compare_block, starts)
    finally:
        os.close(handle)
    return {"size": size, "crc32": checksums}


def _equal(a: memoryview, b: memoryview) -> bool:
    words = len(a) // 8 * 8  # compared as int64: the result of numpy's comparison is then an eighth as large
    same_words = np.array_equal(np.frombuffer(a[:words], np.int64), np.frombuffer(b[:words], np.int64))
    return same_words and bytes(a[words:]) == bytes(b[words:])


def _open_new(path: Path, size: int) -> tuple[int, bool]:
    """Create a file, at its size from the start. Returns its handle, and whether it bypasses the page cache."""
    for flag in (getattr(os, "O_DIRECT", 0), 0):
        handle = -1
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | flag, 0o666)
            os.ftruncate(handle, round_to_pages(size) if flag else size)
            if flag:
                os.preadv(handle, [allocate_pages(PAGE_BYTES)], 0)  # some file systems refuse O_DIRECT only here
            return handle, flag != 0
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            if not flag or error.errno != errno.EINVAL:
                raise
    raise AssertionError


def _fill(handle: int, buffer: mmap.mmap, size: int, start: int, direct: bool = False) -> memoryview:
    """Read `size` bytes of a file into the buffer. Raises Damaged if the file ends before."""
    done = 0
    while done < size:
        room = memoryview(buffer)[done : round_to_pages(size) if direct else size]
        count = os.preadv(handle, [room], start + done)
        if count == 0:
            raise Damaged(f"ends at byte {start + done:,}")
        done += count
    return memoryview(buffer)[:size]


def write_bytes(path: Path, content: bytes) -> FileChecksums:
    """`write` for a file whose bytes are in memory."""
    memory = allocate_pages(len(content))
    memory[: len(content)] = content
    return write(path, len(content), lambda start: memoryview(memory)[start : start + BLOCK_BYTES])


def check_file(path: Path, checksums: FileChecksums) -> None:
    """Raises Damaged unless the file exists and has its recorded size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from None
    if size != checksums["size"]:
        raise Damaged(f"{path.name} has {size:,} of {checksums['size']:,} bytes")


def read(path: Path, checksums: FileChecksums, first: int, stop: int, buffer: mmap.mmap) -> memoryview:
    """Read blocks first..stop-1 of a file into the buffer, and verify each.

    Raises Damaged if the file cannot be read, or if a block does not match its checksum.
    """
    base = first * BLOCK_BYTES
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            content = _fill(handle, buffer, min(stop * BLOCK_BYTES, checksums["size"]) - base, base)
        finally:
            os.close(handle)
    except Damaged as error:
        raise Damaged(f"{path.name} {error}") from None
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from None
    for number in range(first, stop):
        block = content[number * BLOCK_BYTES - base : (number + 1) * BLOCK_BYTES - base]
        if zlib.crc32(block) != checksums["crc32"][number]:
            raise Damaged(f"{path.name}: block {number} is damaged (it does not match its checksum)")
    return content


def read_bytes(path: Path, checksums: FileChecksums) -> bytes:
    """Read and verify a whole file. Raises Damaged."""
    check_file(path, checksums)
    return bytes(read(path, checksums, 0, len(checksums["crc32"]), allocate_pages(checksums["size"])))


def flush(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
