"""Stories -> tokens by all cores, in the order of the stories and in constant memory.

Each batch is encoded in a process of its own, which counts the stories that would not decode to themselves; a few
batches are under way at a time. A corpus of few batches is encoded right here, sooner than processes start.
"""

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.config import UserError
from data.sources import Document
from data.tokenizer import Tokenizer, Words

BATCH_BYTES = 1_000_000  # of text, about
FEW = 8  # batches that are not worth a process
AHEAD = 3  # batches under way for each process


class Encoded(NamedTuple):
    """A story as tokens, without bos and eos."""

    split: str
    ids: np.ndarray
    text_bytes: int  # UTF-8
    log_prob: float | None
    missed: bool  # it does not decode to itself


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, processes: int | None = None
) -> Generator[Encoded, None, None]:
    """Each document in its turn, by `processes` (as many as there are cores to use). Raises UserError."""
    processes = processes or _cores()
    rest = batches(documents)
    first = deque(itertools.islice(rest, FEW + 1))
    alone = processes == 1 or len(first) <= FEW
    parts = itertools.chain(drained(first), rest)
    yield from _here(parts, tokenizer) if alone else _by_processes(parts, tokenizer, processes)


def _here(parts: Iterable[list[Document]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    words = Words(tokenizer)
    for batch in parts:
        yield from zipped(batch, _encode([document.text for document in batch], words))


def _by_processes(parts: Iterable[list[Document]], tokenizer: Tokenizer, processes: int) -> Iterator[Encoded]:
    under_way: deque[tuple[list[Document], Future[Ids]]] = deque()
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (tokenizer.path,))
    try:
        for batch in parts:
            under_way.append((batch, pool.submit(_work, [document.text for document in batch])))
            if len(under_way) > AHEAD * processes:
                yield from _done(*under_way.popleft())
        while under_way:
            yield from _done(*under_way.popleft())
    except BrokenProcessPool:
        why = "a process that encodes was killed, maybe for want of memory; the same command goes on"
        raise UserError(why) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(batch: list[Document], ids: "Future[Ids]") -> Iterator[Encoded]:
    return zipped(batch, ids.result())


def drained(queue: deque[list[Document]]) -> Iterator[list[Document]]:
    """What a queue holds, and let go."""
    while queue:
        yield queue.popleft()


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents by the million bytes; a longer one is a batch of its own."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Ids(NamedTuple):
    """A batch of stories as tokens: few and large arrays, which pass between processes at little cost."""

    ids: np.ndarray  # uint32, story after story
    ends: np.ndarray  # int64, where each ends
    text_bytes: list[int]
    missed: list[bool]


def zipped(batch: list[Document], done: Ids) -> Iterator[Encoded]:
    start = 0
    for document, end, size, missed in zip(batch, done.ends.tolist(), done.text_bytes, done.missed, strict=True):
        yield Encoded(document.split, done.ids[start:end], size, document.log_prob, missed)
        start = end


def _encode(texts: list[str], words: Words) -> Ids:
    stories, came_back = zip(*map(words.encode, texts), strict=True)
    ids = np.frombuffer(b"".join(stories), np.uint32)
    ends = np.cumsum([len(story) // ids.itemsize for story in stories])
    return Ids(ids, ends, [len(text.encode()) for text in texts], [not back for back in came_back])


_words: Words  # of this process


def _begin(model: Path) -> None:
    """A process starts; it ends with the one that started it, however that ends, and leaves Ctrl-C to it."""
    global _words
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _words = Words(Tokenizer(model))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[str]) -> Ids:
    return _encode(texts, _words)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
