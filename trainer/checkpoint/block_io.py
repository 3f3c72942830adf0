"""Files of a checkpoint as bytes: written and read in blocks, with a checksum each.

Blocks go past the page cache where the file system can: that takes a tenth of the processor's time, leaves the corpus
in the cache, and what is read back comes from the disk.
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
from typing import Any

import numpy as np

BLOCK = 1 << 24  # bytes of a checksum, and of a request to the file system
PAGE = 4096  # what goes past the page cache begins and ends at its multiples

Record = dict[str, Any]  # of a file: its size, and the crc32 of each block


class Damaged(Exception):
    """Stored bytes are missing or not what was written; the text says which."""


class Buffers:
    """A buffer for each thread that asks."""

    def __init__(self, size: int = BLOCK) -> None:
        self.size = size
        self._of_thread = threading.local()

    def get(self) -> mmap.mmap:
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = pages(self.size)
        buffer: mmap.mmap = self._of_thread.buffer
        return buffer


def pages(size: int) -> mmap.mmap:
    """Memory for at least `size` bytes that begins and ends at pages."""
    memory = mmap.mmap(-1, whole_pages(size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


class WorkItems:
    """Calls on items, in order, that any number of threads do together; each of them by `finish`."""

    def __init__(self, call: Callable[..., Any], *items: Iterable[Any]) -> None:
        self._call = call
        self._left = deque(enumerate(zip(*items, strict=True)))
        self._results: list[Any] = [None] * len(self._left)
        self._in_hand = 0
        self._changed = threading.Condition()
        self._error: Exception | None = None

    def finish(self) -> list[Any]:
        """Do what no thread has begun, wait for what others have in hand. Results, or the first error raised."""
        while True:
            with self._changed:
                if not self._left:
                    self._changed.wait_for(lambda: not self._in_hand)
                    if self._error is not None:
                        raise self._error
                    return self._results
                number, item = self._left.popleft()
                self._in_hand += 1
            try:
                self._results[number] = self._call(*item)
            except Exception as error:
                self._error = self._error or error
                self._left.clear()
            finally:
                with self._changed:
                    self._in_hand -= 1
                    self._changed.notify_all()


class WorkQueue:
    """Runs batches one after the other, and lets other threads lend a hand with the present one."""

    _batch: WorkItems | None = None
    _given_up = False

    def run(self, call: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
        """`list(map(call, *items))`, or after `cancel` soon an OSError."""

        def one(*item: Any) -> Any:
            if self._given_up:
                raise InterruptedError("the save was cancelled")
            return call(*item)

        self._batch = WorkItems(one, *items)
        return self._batch.finish()

    def cancel(self) -> None:
        self._given_up = True

    def help(self, until: Future[Any]) -> None:
        """Work along until `until` is done."""
        while not until.done():
            if self._batch is not None:
                with suppress(Exception):  # whoever runs the batch hears of it
                    self._batch.finish()
            wait([until], timeout=0.01)  # between two batches


def write(path: Path, size: int, block: Callable[[int], memoryview], queue: WorkQueue | None = None) -> Record:
    """Write a file of `size` bytes, flush it, read it back, compare, and return its record.

    `block(start)` gives the bytes from there on, up to BLOCK of them, and as many more as fill a page; it is asked
    twice for each. Raises OSError, as for a full disk, and Damaged when other bytes come back.
    """
    queue, starts, buffers = queue or WorkQueue(), range(0, size, BLOCK), Buffers()
    handle, direct = _open_new(path, size)

    def put(start: int) -> int:
        content, end, done = block(start), min(BLOCK, size - start), 0
        while done < end:  # past the page cache whole pages only
            done += os.pwrite(handle, content[done : whole_pages(end) if direct else end], start + done)
        return zlib.crc32(content[:end])

    def check(start: int) -> None:
        end = min(BLOCK, size - start)
        back = _fill(handle, buffers.get(), end, start, direct)
        if not _same(back, block(start)[:end]):
            raise Damaged(f"{path.name}: the disk returned other bytes than were written at byte {start:,}")

    try:
        checksums = queue.run(put, starts)
        os.ftruncate(handle, size)
        os.fsync(handle)
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        queue.run(check, starts)
    finally:
        os.close(handle)
    return {"size": size, "crc32": checksums}


def _same(a: memoryview, b: memoryview) -> bool:
    words = len(a) // 8 * 8  # at a time, which leaves numpy's answers an eighth of the bytes
    return np.array_equal(np.frombuffer(a[:words], np.int64), np.frombuffer(b[:words], np.int64)) and (
        bytes(a[words:]) == bytes(b[words:])
    )


def _open_new(path: Path, size: int) -> tuple[int, bool]:
    """A new file, of its size from the start, and whether it goes past the page cache."""
    for flag in (getattr(os, "O_DIRECT", 0), 0):
        handle = -1
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | flag, 0o666)
            os.ftruncate(handle, whole_pages(size) if flag else size)
            if flag:
                os.preadv(handle, [pages(PAGE)], 0)  # some file systems refuse only here
            return handle, flag != 0
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            if not flag or error.errno != errno.EINVAL:
                raise
    raise AssertionError


def _fill(handle: int, buffer: mmap.mmap, size: int, start: int, direct: bool = False) -> memoryview:
    """`size` bytes of a file in the buffer. Raises Damaged where the file ends before."""
    done = 0
    while done < size:
        room = memoryview(buffer)[done : whole_pages(size) if direct else size]
        got = os.preadv(handle, [room], start + done)
        if got == 0:
            raise Damaged(f"ends at byte {start + done:,}")
        done += got
    return memoryview(buffer)[:size]


def write_small(path: Path, content: bytes) -> Record:
    """`write` for bytes in hand."""
    memory = pages(len(content))
    memory[: len(content)] = content
    return write(path, len(content), lambda start: memoryview(memory)[start : start + BLOCK])


def check_file(path: Path, record: Record) -> None:
    """Raises Damaged unless the file is there and as long as it was."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from None
    if size != record["size"]:
        raise Damaged(f"{path.name} has {size:,} of {record['size']:,} bytes")


def read(path: Path, record: Record, first: int, stop: int, buffer: mmap.mmap) -> memoryview:
    """Blocks first..stop-1 of a file, in the buffer, checked. Raises Damaged."""
    base = first * BLOCK
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            content = _fill(handle, buffer, min(stop * BLOCK, record["size"]) - base, base)
        finally:
            os.close(handle)
    except Damaged as error:
        raise Damaged(f"{path.name} {error}") from None
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from None
    for number in range(first, stop):
        if zlib.crc32(content[number * BLOCK - base : (number + 1) * BLOCK - base]) != record["crc32"][number]:
            raise Damaged(f"{path.name}: block {number} is damaged (it does not match its checksum)")
    return content


def read_small(path: Path, record: Record) -> bytes:
    """All of a file, checked. Raises Damaged."""
    check_file(path, record)
    return bytes(read(path, record, 0, len(record["crc32"]), pages(record["size"])))


def flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
