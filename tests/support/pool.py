"""Processes for distributed tests: started once, since each takes seconds to import torch, and used again.

`pool.run(world, "module:function", **kwargs)` calls the function on `world` ranks, in a gloo group of their own, and
returns the results by rank. An exception on any rank is raised here with that rank's traceback.
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


class Pool:
    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: str, timeout: float = 120, **kwargs: Any) -> list[Any]:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < world:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            self._workers.append((process, here))
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
        """What each rank says, or why it says nothing; once one has failed the others have seconds left."""
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        while len(answers) < world and (left := end - time.monotonic()) > 0:
            waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world]) if rank not in answers}
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    self._workers[rank][0].join(5)
                    answers[rank] = False, f"died with exit code {self._workers[rank][0].exitcode}"
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + 3)
        return [answers.get(rank, (False, "no answer")) for rank in range(world)]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()


def _work(pipe: Connection) -> None:
    faulthandler.enable()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            function, kwargs, rank, world, folder = pipe.recv()
        except EOFError:
            return
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in place.items()})
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
