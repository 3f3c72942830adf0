"""A pool of worker processes for distributed tests. Workers are reused, since each needs seconds to import torch.

`pool.run(world, "module:function", **kwargs)` calls the function on `world` ranks in a new gloo process group, and
returns the results by rank. If any rank raises an exception, `run` raises an AssertionError with its traceback.
"""

import faulthandler
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

FAILURE_GRACE_S = 3.0  # the other ranks' time to report, once one rank has failed


class Pool:
    """Worker processes, started when `run` first needs them."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: str, timeout: float = 120, **kwargs: Any) -> list[Any]:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < world:
            pipe, worker_pipe = context.Pipe()
            process = context.Process(target=_work, args=(worker_pipe,), daemon=True)
            process.start()
            self._workers.append((process, pipe))
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send((function, kwargs, rank, world, folder))
            answers = self._answers(world, timeout)
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def _answers(self, world: int, timeout: float) -> list[tuple[bool, Any]]:
        """For each rank True and its result, or False and the reason why it has none."""
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        while len(answers) < world and (remaining := end - time.monotonic()) > 0:
            unanswered = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world]) if rank not in answers}
            for pipe in wait(list(unanswered), remaining):
                assert isinstance(pipe, Connection)
                rank = unanswered[pipe]
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    process = self._workers[rank][0]
                    process.join(5)
                    answers[rank] = False, f"the process ended with exit code {process.exitcode}"
                succeeded, _ = answers[rank]
                if not succeeded:
                    end = min(end, time.monotonic() + FAILURE_GRACE_S)
        return [answers.get(rank, (False, "no answer before the time limit")) for rank in range(world)]

    def close(self) -> None:
        """Kill the workers. A later `run` starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()


def _work(pipe: Connection) -> None:
    """The worker: calls the functions that it receives through the pipe until the pipe is closed."""
    faulthandler.enable()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            function, kwargs, rank, world, folder = pipe.recv()
        except EOFError:
            return
        environment = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in environment.items()})
        try:
            if world > 1:
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
            module, _, name = function.partition(":")
            pipe.send((True, getattr(importlib.import_module(module), name)(**kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
