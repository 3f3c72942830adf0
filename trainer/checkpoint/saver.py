"""Saves checkpoints during a run: one at a time, while training waits or in the background.

`save` writes a checkpoint and publishes it while all ranks wait. With `checkpoint.async_save` it starts a copy of the
tensors and returns; a thread of low priority then writes the copy. Each step's message counts the ranks that have
written. When all have, rank 0 publishes the checkpoint by a rename; after that the ranks agree on the result. A save
that fails on one rank is dropped on all. Training continues, and the previous checkpoint stays.
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
from trainer.checkpoint.block_io import Damaged, FileChecksums
from trainer.checkpoint.folder import FORMAT, TOKENIZER, prune_checkpoints, publish_checkpoint, write_manifest
from trainer.config import CheckpointConfig
from trainer.fault_tolerance.run_lock import LockLost, RunLock

FileResult = tuple[dict[str, FileChecksums], str | None]  # the files that a rank has written, or why it failed


@dataclass
class Save:
    """A save in progress on this rank."""

    step: int
    fields: Mapping[str, Any]  # for the manifest
    partial: Path  # the folder to write into
    written: Future[dict[str, FileChecksums]]  # done when this rank's files are written
    started: float  # time.perf_counter()
    published: Future[None] | None = None  # set when all ranks have written; done when rank 0 has published


def _ignore_result(step: int, seconds: float, error: str | None) -> None:
    """The default of `Saver.on_saved`."""


class Saver:
    """Writes checkpoints of `tensors` into `folder`. It is created, and each method is called, on all ranks together.

    `on_saved(step, seconds, error)` is called at the end of each save; `error` is the reason if it failed, otherwise
    None.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        tokenizer: Path,
        config: CheckpointConfig,
        lock: RunLock | None = None,
        on_saved: Callable[[int, float, str | None], None] = _ignore_result,
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.config = config
        self.lock = lock
        self.on_saved = on_saved
        self.rank = collectives.rank()
        # A separate group: messages of a save come between those of training, which on a GPU are not sent by gloo.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.plan = layout.make_plan(tensors, self.group)
        self._table = json.dumps(self.plan.table)  # once, because it is slow and the table does not change
        self.source = layout.ShardSource(self.plan, tensors)
        self.staging = layout.StagingBuffer(self.source) if config.async_save else None
        self.lock_id = collectives.broadcast(lock.id if lock is not None else "0", self.group)
        self.pending: Save | None = None
        self.newest: int | None = None  # the step of the newest published checkpoint
        self.failed = False  # whether the last save failed
        self._queue = block_io.WorkQueue()
        self._thread = ThreadPoolExecutor(1, "checkpoint", _lower_priority if config.async_save else None)

    def save(self, step: int, fields: Mapping[str, Any], wait: bool = False) -> None:
        """Save the tensors as they are now; `fields` are added to the manifest.

        Returns when the checkpoint is published, or with `checkpoint.async_save`, unless `wait`, at once.
        """
        self.finish()
        started = time.perf_counter()
        partial = self.folder / f".partial-step-{step:08d}-{self.lock_id}"
        staging = None if wait else self.staging
        if staging is not None:
            staging.start()
        self.pending = Save(step, fields, partial, self._thread.submit(self._write, partial, staging), started)
        if staging is None:
            self.finish()

    def _write(self, partial: Path, staging: layout.StagingBuffer | None) -> dict[str, FileChecksums]:
        files = {}
        if staging is not None:
            staging.finish()
        partial.mkdir(parents=True, exist_ok=True)
        if self.plan.starts:
            path = partial / layout.file_name(self.rank)
            source = self.source if staging is None else staging
            files[path.name] = block_io.write(path, self.plan.size, source.block, self._queue)
        if self.rank == 0:
            files[TOKENIZER] = block_io.write_bytes(partial / TOKENIZER, self.tokenizer.read_bytes())
        return files

    def wait_for_staging(self) -> None:
        """Wait until the tensors are copied. To be called before any tensor changes."""
        if self.pending is not None and self.staging is not None:
            self.staging.wait()

    @property
    def ready(self) -> bool:
        """Whether this rank's current stage (write, or publish on rank 0) is done, successfully or not."""
        if self.pending is None:
            return False
        if self.pending.published is None:
            return self.pending.written.done()
        return self.pending.published.done()

    def finish(self) -> None:
        """Wait for the save in progress: publish it, or drop it if it failed on any rank. Raises LockLost."""
        while self.pending is not None:
            self.poll()

    def poll(self) -> None:
        """Continue the save in progress by one of its two stages, once all ranks are ready; waits until they are.

        The first stage starts to publish when all ranks have written; the second agrees on the result. Raises LockLost.
        """
        save = self.pending
        assert save is not None
        if save.published is None:
            self.wait_for_staging()
            self._queue.help(save.written)
            error = save.written.exception()
            mine: FileResult = ({}, _message(error)) if error else (save.written.result(), None)
            results = collectives.gather(mine, self.group)
            save.published = self._thread.submit(self._publish, save, results)
            return
        self.pending = None
        error = save.published.exception()
        result = (_message(error) if error else None, isinstance(error, LockLost))
        message, lock_lost = collectives.broadcast(result, self.group)
        if lock_lost:
            raise LockLost(message)
        self.failed = message is not None
        if not self.failed:
            self.newest = save.step
        self.on_saved(save.step, time.perf_counter() - save.started, message)

    def _publish(self, save: Save, results: list[FileResult]) -> None:
        """On rank 0: publish the files of all ranks as a checkpoint. If any failed, remove them and raise its error."""
        if self.rank != 0:
            return
        try:
            files: dict[str, FileChecksums] = {}
            for written, error in results:
                if error is not None:
                    raise Damaged(error)
                files.update(written)
            manifest = {"format": FORMAT, "step": save.step, **save.fields, "files": files}
            write_manifest(save.partial, manifest, self._table)
            if self.lock is not None:
                self.lock.check()
            publish_checkpoint(save.partial, self.folder / f"step-{save.step:08d}")
        except Exception:
            shutil.rmtree(save.partial, ignore_errors=True)
            raise
        # In the background, because removing gigabytes is slow.
        self._thread.submit(prune_checkpoints, self.folder, save.step, self.config.keep, self.config.keep_every)

    def close(self) -> None:
        """Cancel the save in progress, and end the thread."""
        self._queue.cancel()
        self._thread.shutdown()


def _message(error: BaseException) -> str:
    """The text of an error for the log."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _lower_priority() -> None:
    """Give the thread that writes only the CPU time that training leaves."""
    if sys.platform == "linux":  # elsewhere the priority is that of the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
