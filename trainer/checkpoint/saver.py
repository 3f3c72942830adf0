"""Saves of a run: one at a time, at once or in the background, and published when all ranks have written.

`save` writes and publishes while everyone waits; or, with `checkpoint.async_save`, stages a copy and returns. Then a
thread of low priority writes it, and each step's message counts the ranks that are done: when all have written, rank 0
publishes, and when it has, all know. A save that fails on any rank is dropped on all: the run goes on, the checkpoint
before stays.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel import collectives
from trainer.checkpoint import block_io, layout
from trainer.checkpoint.block_io import Damaged, Record
from trainer.checkpoint.folder import FORMAT, TOKENIZER, prune_checkpoints, publish_checkpoint, write_manifest
from trainer.config import CheckpointConfig
from trainer.fault_tolerance.run_lock import LockLost, RunLock


@dataclass
class Save:
    """A save that is under way on this rank."""

    step: int
    fields: Mapping[str, Any]
    partial: Path
    files: Future[dict[str, Record]]  # that this rank writes
    began: float
    published: Future[None] | None = None  # by rank 0, once all have written


class Saver:
    """Writes checkpoints of `tensors` into `folder`. Made, and all its methods called, on all ranks together.

    `tell(step, seconds, why)` hears of each save that has ended; `why` it failed, or None.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        tokenizer: Path,
        config: CheckpointConfig,
        lock: RunLock | None = None,
        tell: Callable[[int, float, str | None], None] = lambda step, seconds, why: None,
    ) -> None:
        self.folder, self.tokenizer, self.config, self.lock, self.tell = folder, tokenizer, config, lock, tell
        self.rank = collectives.rank()
        # of its own: saves come between the messages of training, and on a GPU these are not for the CPU
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.plan = layout.make_plan(tensors, self.group)
        self._table = json.dumps(self.plan.table)  # takes a while, and stays the same
        self.source = layout.ShardSource(self.plan, tensors)
        self.image = layout.StagingBuffer(self.source) if config.async_save else None
        self.mark = collectives.broadcast(lock.id if lock is not None else "0", self.group)
        self.pending: Save | None = None
        self.newest: int | None = None  # the step of the last that was published
        self.failed = False  # the last save
        self._queue = block_io.WorkQueue()
        self._thread = ThreadPoolExecutor(1, "checkpoint", _lower_priority if config.async_save else None)

    def save(self, step: int, fields: Mapping[str, Any], wait: bool = False) -> None:
        """Save the tensors as they are now; `fields` go into the manifest. In the background if it may."""
        self.finish()
        partial, began = self.folder / f".partial-step-{step:08d}-{self.mark}", time.perf_counter()
        image = None if wait else self.image
        if image is not None:
            image.begin()
        self.pending = Save(step, fields, partial, self._thread.submit(self._write, partial, image), began)
        if image is None:
            self.finish()

    def _write(self, partial: Path, image: layout.StagingBuffer | None) -> dict[str, Record]:
        files = {}
        if image is not None:
            image.help()
        partial.mkdir(parents=True, exist_ok=True)
        if self.plan.begins:
            path, source = partial / layout.file_name(self.rank), image or self.source
            files[path.name] = block_io.write(path, self.plan.size, source.block, self._queue)
        if self.rank == 0:
            files[TOKENIZER] = block_io.write_small(partial / TOKENIZER, self.tokenizer.read_bytes())
        return files

    def wait_for_staging(self) -> None:
        """To be called before any tensor changes: ends the staged copy."""
        if self.pending is not None and self.image is not None:
            self.image.end()

    @property
    def ready(self) -> bool:
        """Whether this rank has written what it had to of what is pending, or failed: its file, then the manifest."""
        return self.pending is not None and (self.pending.published or self.pending.files).done()

    def finish(self) -> None:
        """Publish what is pending, or drop it if it failed on any rank; waits for it. Raises LockLost."""
        while self.pending is not None:
            self.poll()

    def poll(self) -> None:
        """From written to being published, or from that to known by all. Waits for all ranks to be ready."""
        save = self.pending
        assert save is not None
        if save.published is None:
            self.wait_for_staging()
            self._queue.help(save.files)
            error = save.files.exception()
            everyone = collectives.gather(({}, _reason(error)) if error else (save.files.result(), None), self.group)
            save.published = self._thread.submit(self._publish, save, everyone)
            return
        self.pending = None
        error = save.published.exception()
        why, lost = collectives.broadcast((_reason(error) if error else None, isinstance(error, LockLost)), self.group)
        if lost:
            raise LockLost(why)
        self.failed = why is not None
        if not self.failed:
            self.newest = save.step
        self.tell(save.step, time.perf_counter() - save.began, why)

    def _publish(self, save: Save, everyone: list[tuple[dict[str, Record], str | None]]) -> None:
        """Name what all ranks have written, or remove it. Raises what went wrong; rank 0 alone has something to do."""
        if self.rank != 0:
            return
        try:
            if why := next((why for _, why in everyone if why), None):
                raise Damaged(why)
            files = {name: record for files, _ in everyone for name, record in files.items()}
            manifest = {"format": FORMAT, "step": save.step, **save.fields, "files": files}
            write_manifest(save.partial, manifest, self._table)
            if self.lock is not None:
                self.lock.check()
            publish_checkpoint(save.partial, self.folder / f"step-{save.step:08d}")
        except Exception:
            shutil.rmtree(save.partial, ignore_errors=True)
            raise
        # removing gigabytes takes a while
        self._thread.submit(prune_checkpoints, self.folder, save.step, self.config.keep, self.config.keep_every)

    def close(self) -> None:
        """Give up what is still being written."""
        self._queue.cancel()
        self._thread.shutdown()


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _lower_priority() -> None:
    """The writer takes the time that training leaves."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
