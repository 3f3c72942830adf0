"""Runs parts one after another, each in its own process, within a budget of seconds.

A part that raises, crashes, loses its CUDA context or hangs is recorded as failed, and the next part starts with a new
context. Processes are forked from a server that has imported torch but not initialized CUDA, so a start needs about a
second.
"""

import faulthandler
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.gpu.check.report import Report

RESERVE_S = 3.0  # kept for the tables at the end


@dataclass(frozen=True)
class Options:
    """The options of the command; the same in every process."""

    out: Path
    device: str
    start: float  # time.time()
    budget: float  # seconds from start
    ranks: int = 1

    @property
    def ends(self) -> float:
        return self.start + self.budget - RESERVE_S

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def scratch(self) -> Path:
        """A folder for corpora and checkpoints, which are large. It is removed at the end."""
        return self.out / "scratch"


@dataclass(frozen=True)
class Check:
    """What a part needs: the device, the folders, the time at which it must end, and the report."""

    options: Options
    report: Report
    ends: float  # time.time()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.options.device == "cuda" else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        return self.options.device == "cuda"

    def seconds_left(self) -> float:
        return self.ends - time.time()

    def case(self, name: str, run: Callable[[], object], seconds: float = 0.0) -> None:
        """Run one case. Skip it if fewer than `seconds` are left, record its traceback if it raises."""
        if self.seconds_left() < seconds:
            self.report.skip(name, f"no time left: it needs about {seconds:.0f} s")
            return
        try:
            run()
        except Exception:
            self.report.fail(name, traceback.format_exc())


@dataclass(frozen=True)
class Part:
    name: str
    run: Callable[[Check], None]
    about: str
    seconds: int  # a guess for one H100
    on_cpu: bool = True  # whether --device cpu can run it

    @property
    def limit(self) -> float:
        """Seconds after which the part is considered hung: a slow or busy machine may need three times as long."""
        return 60 + 3 * self.seconds


def run_parts(parts: Sequence[Part], options: Options) -> None:
    """Run the parts in this order. Their records are written to `options.results`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    try:
        for part in parts:
            report = Report(options.results, part.name, options.start)
            left = options.ends - time.time()
            if not part.on_cpu and options.device == "cpu":
                report.skip("", "needs a CUDA device")
            elif left < part.seconds / 2:
                why = f"it needs about {part.seconds} s, and {max(0.0, left):.0f} of {options.budget:.0f} s are left"
                report.skip("", f"no time left: {why}; see --budget and --part")
            else:
                process = context.Process(target=_run_part, args=(part, options, report))
                run_alone(process, min(left, part.limit), report)
    finally:
        shutil.rmtree(options.scratch, ignore_errors=True)


def run_alone(process: multiprocessing.process.BaseProcess, limit: float, report: Report) -> None:
    """Start the process and wait until it ends. After `limit` seconds kill it and all processes that it started."""
    process.start()
    try:
        process.join(limit)
        hangs = process.is_alive()
    finally:  # also after Ctrl-C, which does not reach a process in another process group
        _kill(process)
    if hangs:
        report.fail("", f"killed, because it was still running after {limit:.0f} s")
    elif process.exitcode:
        ended = f"exit code {process.exitcode}"
        if process.exitcode < 0:
            ended = signal.Signals(-process.exitcode).name
        report.fail("", f"the process was ended by {ended}")


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    """Kill the process, if it runs, and all processes that it started."""
    if process.is_alive():
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not created its process group yet
            process.kill()
        process.join()


def _run_part(part: Part, options: Options, report: Report) -> None:
    os.setsid()  # a new process group, which can be killed as a whole
    faulthandler.enable()  # a crash prints a stack trace
    options.scratch.mkdir(parents=True, exist_ok=True)
    try:
        part.run(Check(options, report, options.ends))
    except Exception:
        report.fail("", traceback.format_exc())
    sys.stdout.flush()
