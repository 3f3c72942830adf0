"""Stories -> tokens by all cores, in the order of the stories and in constant memory.

Each batch is encoded in a process of its own, which counts the stories that would not decode to themselves; a few
batches are under way at a time. A corpus of few batches is encoded right here, sooner than processes start.
"""

import contextlib
import itertools
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Self

import numpy as np

from data.settings import UserError
from data.sources.base import Document
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
    """A thread for each process hands it a batch and waits for the tokens.

    Each has a pipe of its own: where processes share one, as in ProcessPoolExecutor, one that is killed in the middle
    of an answer leaves all waiting for the rest of it.
    """
    under_way: deque[tuple[list[Document], Future[Ids]]] = deque()
    with contextlib.ExitStack() as stack:
        idle = SimpleQueue[_Encoder]()
        for _ in range(processes):
            idle.put(stack.enter_context(_Encoder(tokenizer.path)))

        def work(texts: list[str]) -> Ids:
            encoder = idle.get()
            try:
                return encoder(texts)
            finally:
                idle.put(encoder)

        pool = ThreadPoolExecutor(processes, "encode")
        stack.callback(pool.shutdown, cancel_futures=True)
        for batch in parts:
            under_way.append((batch, pool.submit(work, [document.text for document in batch])))
            if len(under_way) > AHEAD * processes:
                yield from _done(*under_way.popleft())
        while under_way:
            yield from _done(*under_way.popleft())


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


class _Encoder:
    """A process that encodes batches until its pipe ends, as it does with the one that started it."""

    def __init__(self, model: Path) -> None:
        context = get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, model), daemon=True)
        self._process.start()
        there.close()

    def __call__(self, texts: list[str]) -> Ids:
        """Raises UserError when the process is gone."""
        try:
            self._pipe.send(texts)
            answer: Ids = self._pipe.recv()
        except (EOFError, ConnectionError):
            why = "a process that encodes was killed, maybe for want of memory; the same command goes on"
            raise UserError(why) from None
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join()


def _work(pipe: Connection, model: Path) -> None:
    """What a process does; Ctrl-C it leaves to the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    words = Words(Tokenizer(model))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_encode(pipe.recv(), words))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
