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
def call_when(event: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """In a `with` block: calls `act` from a thread as soon as `event` returns true."""
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


def run_with_signal(corpus: str, runs: str, more: list[str], rank: int, number: int, kind: str, times: int) -> int:
    """Runs until the end or a stop; `rank` sends itself signal `number` during the run. Returns the exit code.

    The signal is sent as soon as metrics.jsonl has `times` lines whose kind or event is `kind`. If `kind` is `start`,
    it is sent before the run starts; if no line has that kind, such as `never`, no signal is sent.
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
        with call_when(event, act):
            return train(config, stop)


def fail_at_step(step: int, error: Exception) -> None:
    """Makes this process raise `error` when its loader prepares this step."""
    original = Loader.step

    def prepare(self: Loader, number: int) -> Any:
        if number == step:
            raise error
        return original(self, number)

    Loader.step = prepare  # type: ignore[method-assign, assignment]


def run_with_nonfinite_steps(
    corpus: str, runs: str, more: list[str], rank: int, what: str, at: list[int]
) -> list[dict[str, Any]]:
    """A run with non-finite numbers on `rank` in the steps `at`.

    `what` is `loss` (the loss is NaN) or `gradient` (the loss is finite, but its gradient is infinite). Returns a
    dictionary for each step: its number, the counts of skipped steps and of tokens, the loss scale, and in `moved`
    whether it changed weights, moments or biases of this rank. If the run raises an exception, the last dictionary has
    its text in `error`.
    """
    original_loss, original_step = transformer.linear_cross_entropy, step_module.train_step
    records: list[dict[str, Any]] = []
    current_step = 0

    def loss(hidden: Tensor, *arguments: Any) -> Tensor:
        is_faulty = current_step in at and World.from_environment().rank == rank
        if is_faulty and what == "gradient":
            hidden.register_hook(lambda gradient: gradient * torch.inf)
        value = original_loss(hidden, *arguments)
        return value * torch.nan if is_faulty and what == "loss" else value

    def state(run: Run) -> list[Tensor]:
        tensors = [*run.model.parameters(), *run.model.buffers()]
        for moments in run.optimizer.state.values():
            tensors += moments.values()
        return [to_local(tensor).clone() for tensor in tensors]

    def step(run: Run, batch: Any) -> step_module.StepResult:
        nonlocal current_step
        current_step = run.step + 1
        before = state(run)
        result = original_step(run, batch)
        is_equal = [torch.equal(a, b) for a, b in zip(before, state(run), strict=True)]
        records.append(
            {
                "step": run.step,
                "moved": not all(is_equal),
                "skipped": run.skipped_steps,
                "tokens": run.tokens,
                "scale": run.scale.value,
            }
        )
        return result

    with mock.patch.object(transformer, "linear_cross_entropy", loss), mock.patch("trainer.loop.train_step", step):
        try:
            cases.run(Path(corpus), Path(runs), *more)
        except Exception as error:
            records.append({"error": str(error)})
    return records


def wait_for(event: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until `event` returns a true value, for up to `seconds`. Returns its last value."""
    end = time.monotonic() + seconds
    while not (value := event()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


SIGTERM, SIGUSR1, SIGINT = int(signal.SIGTERM), int(signal.SIGUSR1), int(signal.SIGINT)
