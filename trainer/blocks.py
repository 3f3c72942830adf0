"""Files of a checkpoint as bytes: written and read in blocks, with a checksum each.

Blocks go past the page cache where the file system can: that takes a tenth of the processor's time, leaves the corpus
in the cache, and what is read back comes from the disk.
"""

import errno
import mmap
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK = 1 << 24  # bytes of a checksum, and of a request to the file system
THREADS = 2  # that move bytes: one waits for the disk while the other computes
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


class Threads:
    """`with Threads(n) as run`: run(call, items) is `list(map(call, items))` by n threads, or by this one alone."""

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, "blocks") if threads > 1 else None

    def __enter__(self) -> Callable[..., list[Any]]:
        run = map if self._pool is None else self._pool.map
        return lambda call, *items: list(run(call, *items))

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def write(
    path: Path,
    size: int,
    block: Callable[[int], memoryview],
    threads: int = THREADS,
    given_up: threading.Event | None = None,
) -> Record:
    """Write a file of `size` bytes, flush it, read it back, and return its record.

    `block(start)` gives the bytes from there on, up to BLOCK of them, and as many more as fill a page. Raises OSError,
    as for a full disk; Damaged when other bytes come back, or soon after `given_up` is set.
    """
    starts = range(0, size, BLOCK)
    buffers = Buffers()
    handle, direct = _open_new(path, size)

    def put(start: int) -> int:
        if given_up is not None and given_up.is_set():
            raise Damaged(f"{path.name}: given up")
        content, end = block(start), min(BLOCK, size - start)
        left = content if direct else content[:end]
        while left:
            left = left[os.pwrite(handle, left, start + len(content) - len(left)) :]
        return zlib.crc32(content[:end])

    def check(start: int, wanted: int) -> None:
        if zlib.crc32(_fill(handle, buffers.get(), min(BLOCK, size - start), start, direct)) != wanted:
            raise Damaged(f"{path.name}: the disk gives back other bytes at {start:,}")

    try:
        with Threads(threads) as run:
            checksums = run(put, starts)
            os.ftruncate(handle, size)
            os.fsync(handle)
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            run(check, starts, checksums)
    finally:
        os.close(handle)
    return {"size": size, "crc32": checksums}


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
    return write(path, len(content), lambda start: memoryview(memory)[start : start + BLOCK], threads=1)


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
            raise Damaged(f"{path.name}: block {number} is not what was written")
    return content


def read_small(path: Path, record: Record) -> bytes:
    """All of a file, checked. Raises Damaged."""
    check_file(path, record)
    return bytes(read(path, record, 0, len(record["crc32"]), pages(record["size"])))


def flush(folder: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
