"""Stories -> tokens on all cores, in the order of the stories and in constant memory.

`data.prepare` calls `encode` between reading a source and writing shards. Stories are grouped into batches. Each batch
is encoded by one of several processes, which also checks that each story decodes to itself; only a few batches are in
progress at a time. If there are only a few batches, they are encoded in the calling process, which is faster than
starting others.
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
from data.tokenizer import CachedEncoder, Tokenizer

BATCH_CHARS = 1_000_000  # a batch ends with the story that reaches this number
MAX_BATCHES_WITHOUT_PROCESSES = 8
BATCHES_AHEAD_PER_PROCESS = 3


class EncodedStory(NamedTuple):
    """A story as tokens, without bos and eos."""

    split: str
    ids: np.ndarray  # (tokens,) uint32
    text_bytes: int  # UTF-8
    log_prob: float | None  # nats, if the source knows it
    roundtrip_failed: bool  # the tokens do not decode to the story


class EncodedBatch(NamedTuple):
    """A batch of stories as tokens: a few large arrays, which are cheap to send from process to process."""

    ids: np.ndarray  # (tokens,) uint32, story after story
    ends: np.ndarray  # (stories,) int64, where each story ends in `ids`
    text_bytes: list[int]
    roundtrip_failed: list[bool]


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, processes: int | None = None
) -> Generator[EncodedStory, None, None]:
    """The documents as tokens, in their order, encoded by `processes` processes (default: one per usable core).

    Raises UserError if a process is killed or a text is not valid Unicode.
    """
    processes = processes or usable_cores()
    batches = group(documents)
    first = deque(itertools.islice(batches, MAX_BATCHES_WITHOUT_PROCESSES + 1))
    has_few_batches = len(first) <= MAX_BATCHES_WITHOUT_PROCESSES
    batches = itertools.chain(pop_all(first), batches)
    if processes == 1 or has_few_batches:
        yield from _encode_without_processes(batches, tokenizer)
    else:
        yield from _encode_in_processes(batches, tokenizer, processes)


def _encode_without_processes(batches: Iterable[list[Document]], tokenizer: Tokenizer) -> Iterator[EncodedStory]:
    encoder = CachedEncoder(tokenizer)
    for batch in batches:
        yield from ungroup(batch, _encode_batch([document.text for document in batch], encoder))


def _encode_in_processes(
    batches: Iterable[list[Document]], tokenizer: Tokenizer, processes: int
) -> Iterator[EncodedStory]:
    """As many threads as processes: each sends a batch to an idle process and waits for the tokens.

    Each process has a pipe of its own. If processes share one, as in ProcessPoolExecutor, and one of them is killed in
    the middle of an answer, all others wait forever for the remaining bytes of it.
    """
    in_progress: deque[tuple[list[Document], Future[EncodedBatch]]] = deque()
    with contextlib.ExitStack() as stack:
        idle = SimpleQueue[_EncoderProcess]()
        for _ in range(processes):
            idle.put(stack.enter_context(_EncoderProcess(tokenizer.path)))

        def encode_batch(texts: list[str]) -> EncodedBatch:
            encoder = idle.get()
            try:
                return encoder.encode(texts)
            finally:
                idle.put(encoder)

        threads = ThreadPoolExecutor(processes, "encode")
        stack.callback(threads.shutdown, cancel_futures=True)
        for batch in batches:
            in_progress.append((batch, threads.submit(encode_batch, [document.text for document in batch])))
            if len(in_progress) > BATCHES_AHEAD_PER_PROCESS * processes:
                yield from _wait_for_first(in_progress)
        while in_progress:
            yield from _wait_for_first(in_progress)


def _wait_for_first(in_progress: "deque[tuple[list[Document], Future[EncodedBatch]]]") -> Iterator[EncodedStory]:
    batch, encoded = in_progress.popleft()
    return ungroup(batch, encoded.result())


def pop_all(queue: deque[list[Document]]) -> Iterator[list[Document]]:
    """The items of a queue, each removed from it, so that its memory can be freed."""
    while queue:
        yield queue.popleft()


def group(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches of about BATCH_CHARS characters; a longer document ends its batch."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ungroup(batch: list[Document], encoded: EncodedBatch) -> Iterator[EncodedStory]:
    """The stories of an encoded batch."""
    start = 0
    columns = zip(batch, encoded.ends.tolist(), encoded.text_bytes, encoded.roundtrip_failed, strict=True)
    for document, end, text_bytes, roundtrip_failed in columns:
        yield EncodedStory(document.split, encoded.ids[start:end], text_bytes, document.log_prob, roundtrip_failed)
        start = end


def _encode_batch(texts: list[str], encoder: CachedEncoder) -> EncodedBatch:
    stories, failed = [], []
    for text in texts:
        story, is_lossless = encoder.encode(text)
        stories.append(story)
        failed.append(not is_lossless)
    ids = np.frombuffer(b"".join(stories), np.uint32)
    ends = np.cumsum([len(story) // ids.itemsize for story in stories])
    return EncodedBatch(ids, ends, [len(text.encode()) for text in texts], failed)


class _EncoderProcess:
    """A process that encodes batches until its pipe is closed, which also happens if the parent process ends."""

    def __init__(self, model: Path) -> None:
        context = get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_pipe, model), daemon=True)
        self._process.start()
        child_pipe.close()

    def encode(self, texts: list[str]) -> EncodedBatch:
        """Raises UserError if the process has ended."""
        try:
            self._pipe.send(texts)
            encoded: EncodedBatch = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError(
                "a process that encodes stories was killed, possibly because memory ran out; "
                "run the same command again to resume"
            ) from None
        return encoded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, model: Path) -> None:
    """The main function of a process. It ignores Ctrl-C, which the parent process handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encoder = CachedEncoder(Tokenizer(model))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_encode_batch(pipe.recv(), encoder))


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
