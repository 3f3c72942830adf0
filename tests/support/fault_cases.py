"""Faults on one rank that tests cause on purpose, in the pool's processes and in this one."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from data.loader import Loader
from model import transformer
from parallel.fsdp import to_local
from parallel.mesh import World
from tests.support import run_cases as cases
from trainer import step as step_module
from trainer.fault_tolerance.signals import StopFlag
from trainer.loop import train
from trainer.metrics import read_lines
from trainer.run import Run


@contextmanager
def when(event: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Call `act` from a thread as soon as `event` returns true."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            if event():
                return act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def signalled(corpus: str, runs: str, more: list[str], rank: int, number: int, kind: str, times: int) -> int:
    """A run whose `rank` gets signal `number` as soon as metrics.jsonl has `times` lines of a kind. Its exit code.

    kind: a kind of line or an event; `start`: the signal comes at once; `never`: no signal.
    """
    config = cases.config(Path(corpus), Path(runs), *more)
    metrics = config.run.folder / "metrics.jsonl"

    def event() -> bool:
        return sum(kind in (x["kind"], x.get("event")) for x in read_lines(metrics)) >= times

    def act() -> None:
        os.kill(os.getpid(), number)

    with StopFlag() as stop:
        if World.from_environment().rank != rank:
            return train(config, stop)
        if kind == "start":
            act()
            return train(config, stop)
        with when(event, act):
            return train(config, stop)


def fail_at(step: int, error: Exception) -> None:
    """From now on this process raises `error` when it prepares this step."""
    plain = Loader.step

    def prepare(self: Loader, number: int) -> Any:
        if number == step:
            raise error
        return plain(self, number)

    Loader.step = prepare  # type: ignore[method-assign, assignment]


def poisoned(corpus: str, runs: str, more: list[str], rank: int, what: str, at: list[int]) -> list[dict[str, Any]]:
    """A run whose `rank` has a loss of NaN, or a finite one with an infinite gradient, in steps `at`.

    Returns for each step what it says, and whether it moved weights, moments or biases of this rank.
    """
    plain_loss, plain_step = transformer.linear_cross_entropy, step_module.train_step
    told: list[dict[str, Any]] = []
    now = [0]

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *gradient: Any) -> Tensor:
        bad = now[0] in at and World.from_environment().rank == rank
        if bad and what == "gradient":
            hidden.register_hook(lambda gradient: gradient * torch.inf)
        value = plain_loss(hidden, weight, targets, *gradient)
        return value * torch.nan if bad and what == "loss" else value

    def state(run: Run) -> list[Tensor]:
        tensors = [to_local(x) for x in [*run.model.parameters(), *run.model.buffers()]]
        return [t.clone() for t in tensors + [to_local(t) for s in run.optimizer.state.values() for t in s.values()]]

    def step(run: Run, batch: Any) -> step_module.StepResult:
        now[0], before = run.step + 1, state(run)
        result = plain_step(run, batch)
        same = [torch.equal(a, b) for a, b in zip(before, state(run), strict=True)]
        told.append({"step": run.step, "moved": not all(same), "skipped": run.skipped_steps, "tokens": run.tokens})
        told[-1]["scale"] = run.scale.value
        return result

    with mock.patch.object(transformer, "linear_cross_entropy", loss), mock.patch("trainer.loop.train_step", step):
        try:
            cases.run(Path(corpus), Path(runs), *more)
        except Exception as end:
            told.append({"error": str(end)})
    return told


def wait_for(event: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until `event` returns a true value, for up to `seconds`. Returns its last value."""
    end = time.monotonic() + seconds
    while not (value := event()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


SIGTERM, SIGUSR1, SIGINT = int(signal.SIGTERM), int(signal.SIGUSR1), int(signal.SIGINT)
