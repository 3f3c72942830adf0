"""Faults during a run: bad gradients, no memory, a full disk, and ranks that fail, hang or never start."""

import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.settings import UserError
from parallel.mesh import World
from parallel.rendezvous import join_store
from tests.support import fault_cases
from tests.support import run_cases as cases
from tests.support.launched_runs import living_processes
from trainer.config import LogConfig
from trainer.fault_tolerance.errors import Stopped, memory_error
from trainer.fault_tolerance.signals import StopFlag
from trainer.fault_tolerance.watchdog import Progress, Watchdog, describe_ranks
from trainer.metrics import Reporter, read_lines
from trainer.spikes import Spikes

ROOT = Path(__file__).parents[3]


# spikes of the loss


def test_a_spike_is_told_once():
    spikes, noise = Spikes(), torch.Generator().manual_seed(0)
    falling = [6 * 0.99**n + float(torch.randn((), generator=noise)) * 0.1 for n in range(400)]
    assert [spikes.median_if_spike(x) for x in falling] == [None] * 400
    median = spikes.median_if_spike(3.0)
    assert median is not None and abs(median) < 1.0
    assert spikes.median_if_spike(3.0) is None and spikes.median_if_spike(0.1) is None
    assert spikes.median_if_spike(3.0) is not None


def test_a_spike_is_reported(corpus_dir, tmp_path, capsys, monkeypatch):
    from model import transformer

    plain, calls = transformer.linear_cross_entropy, []

    def jumping(*args):
        calls.append(1)
        return plain(*args) * (5.0 if 30 * 3 < len(calls) <= 31 * 3 else 1.0)

    monkeypatch.setattr(transformer, "linear_cross_entropy", jumping)
    assert cases.run(corpus_dir, tmp_path, "run.name=spike", "train.steps=40") == 0
    events = [x for x in read_lines(tmp_path / "spike" / "metrics.jsonl") if x.get("event") == "spike"]
    assert [x["step"] for x in events] == [31] and events[0]["loss"] > 3 * events[0]["usual"]
    assert capsys.readouterr().out.count("step 31: loss") == 1


# Memory and disk.


def test_a_model_too_large_for_memory_ends_in_one_line(corpus_dir, tmp_path):
    with pytest.raises(UserError, match="out of memory while building the model.*--dry-run") as error:
        cases.run(corpus_dir, tmp_path, "model.expert_dim=17592186044416")
    assert "\n" not in str(error.value)


def test_a_step_out_of_memory_names_the_settings_to_lower():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    line = memory_error(error.value, "backward", 7, 16, 1024)
    assert "out of memory in step 7, backward: lower train.micro_batch_size=16 or data.seq_len=1024" in str(line)
    assert memory_error(MemoryError(), "data", 1, 1, 1) and memory_error(torch.OutOfMemoryError("CUDA"), "x", 1, 1, 1)
    assert memory_error(RuntimeError("shapes"), "forward", 1, 1, 1) is None


def test_a_full_disk_loses_metrics_but_does_not_end_the_run(tmp_path, capsys):
    """A limit on the size of files has the same effect on a process as a full disk."""
    reporter = Reporter(tmp_path, LogConfig(wandb="disabled"), "full", True)
    reporter.write("train", 1, loss=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        for step in (2, 3):
            reporter.write("train", step, loss=1.0)
        reporter.write_text(tmp_path / "samples" / "a.txt", "long " * 100)
        reporter.event(3, "too long for the space left on the disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reporter.write("train", 4, loss=1.0)
    assert [x["step"] for x in read_lines(tmp_path / "metrics.jsonl")] == [1, 4]  # and no line is incomplete
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    out = capsys.readouterr().out
    assert out.count("cannot be written") == 1 and "the run continues without it" in out


# Ranks that fail, hang, or never start.


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


class Recorded(Watchdog):
    """A watchdog that records the line instead of ending the process."""

    line = ""

    def _end_process(self, line, code):
        self.line = line
        self.close()


@pytest.fixture
def starting(tmp_path):
    """The watchdogs of two ranks with a real store, in this process, before the first step."""
    store = dist.FileStore(str(tmp_path / "store"), 2)
    both = [Recorded(rank, 2, StopFlag(), 6, tmp_path / "run") for rank in (0, 1)]
    for watchdog in both:
        watchdog.mark("loading weights")
        watchdog.start(store)
    yield both
    for watchdog in both:
        watchdog.close()


@pytest.fixture
def watchdogs(starting):
    """The same, in their steps."""
    for watchdog in starting:
        watchdog.enter_steps()
    return starting


@pytest.mark.parametrize("requeue", [True, False])
def test_before_the_first_step_a_stop_of_one_rank_ends_all(starting, requeue, capfd):
    first, second = starting
    second.stop.requested, second.stop.requeue = True, requeue
    for watchdog in starting:
        assert fault_cases.wait_for(lambda watchdog=watchdog: watchdog._ended is not None)
        with pytest.raises(Stopped):
            watchdog.mark("building the model")
        assert isinstance(watchdog.final_error(LOST), Stopped)  # the other rank has ended already
    assert capfd.readouterr().err == "stopped before the first step\n"
    assert (first.folder / "requeue").exists() == requeue
    with pytest.raises(Stopped):
        first.enter_steps()


def test_a_dead_rank_prevents_a_stop_before_the_first_step(starting):
    """torchrun sends SIGTERM to the other ranks because one died. That is no stop, and writes no requeue file."""
    first, second = starting
    second.close()
    time.sleep(0.5)
    first.stop.requested = first.stop.requeue = True
    time.sleep(1)
    first.mark("building the model")
    assert not first.folder.exists()


def test_all_ranks_end_with_the_first_error_of_any_rank(watchdogs, monkeypatch):
    monkeypatch.setattr("trainer.fault_tolerance.watchdog.GRACE_PERIOD_S", 2)
    first, second = watchdogs
    second.mark("data", 6)
    error = ValueError("no\nsuch row")
    assert second.final_error(error) is error
    line = "rank 1 failed: ValueError: no such row (step 6, data)"
    assert str(first.final_error(LOST)) == line and first.final_error(LOST).code == 1
    first._deadline = None  # as if its main thread waited in C++ without end
    assert fault_cases.wait_for(lambda: first.line == line)


def test_rank_0_prints_the_user_error_of_another_rank(watchdogs):
    first, second = watchdogs
    error = UserError("x.y=1: no")
    assert second.final_error(error) is error
    final = first.final_error(LOST)
    assert str(final) == "rank 1: x.y=1: no" and final.code == 2


def test_a_rank_that_was_killed_is_named(watchdogs):
    first, second = watchdogs
    with subprocess.Popen(["true"]) as process:
        process.wait()
    second.progress.pid = process.pid
    first.mark("forward", 7)
    second.mark("backward", 6)
    time.sleep(1.5)  # until it is in the store
    assert str(first.final_error(LOST)) == (
        "step 7, forward: rank 1 is gone: it was killed, or its machine failed (last seen in step 6, backward)"
    )


def test_a_rank_that_hangs_is_named_by_all_ranks(watchdogs):
    first, second = watchdogs
    second.mark("data", 12)
    for phase in ("data", "forward"):
        first.mark(phase, 12)
    assert fault_cases.wait_for(lambda: first.line and second.line)
    for watchdog in watchdogs:
        assert "no rank has made progress for" in watchdog.line and "(run.timeout=6)" in watchdog.line
        assert "behind: rank 1 (step 12, data" in watchdog.line and "waiting: rank 0 (step 12, forward" in watchdog.line


def test_a_rank_that_is_slow_does_not_count_as_hanging(watchdogs):
    first, second = watchdogs
    end = time.monotonic() + 12  # twice run.timeout; the first rank waits, the second makes progress
    first.mark("saving", 3)
    while time.monotonic() < end:
        second.mark("evaluation", 3)
        time.sleep(0.3)
    assert not first.line and not second.line


@pytest.fixture
def busy_cpu(monkeypatch):
    """This process seems to use a whole core, as while it builds a model, or waits for NCCL or a GPU."""
    monkeypatch.setattr("trainer.fault_tolerance.watchdog.time.process_time", time.monotonic)


@pytest.mark.parametrize("phase, step", [("connecting", None), ("forward", 1), ("all-reduce", 1)])
def test_ranks_that_only_spin_while_they_connect_hang(starting, busy_cpu, phase, step):
    for watchdog in starting:
        watchdog.mark(phase, step)
        if step:
            watchdog.enter_steps()
    assert fault_cases.wait_for(lambda: all(watchdog.line for watchdog in starting), 30)
    for watchdog in starting:
        assert "no rank has made progress for" in watchdog.line
        assert "no rank is behind; waiting: ranks 0-1" in watchdog.line


def test_to_build_a_model_for_long_is_no_hang(starting, busy_cpu):
    for watchdog in starting:
        watchdog.mark("building the model")
    time.sleep(9)  # 1.5 times run.timeout
    assert not any(watchdog.line for watchdog in starting)


def test_the_source_line_is_that_of_the_main_thread():
    with ThreadPoolExecutor(1) as thread:
        line = thread.submit(Watchdog()._source_line).result()
    assert line.startswith("tests/trainer/fault_tolerance/test_watchdog.py:")


def test_ranks_in_the_same_place_are_grouped():
    ranks = {rank: Progress(4, "forward", 10, source_line="parallel/x.py:3") for rank in range(6)}
    assert describe_ranks(ranks, [], []) == "no rank is behind; waiting: ranks 0-5 (step 4, forward, parallel/x.py:3)"
    ranks[3] = Progress(4, "data", 9)
    line = "behind: rank 3 (step 4, data, not responding)"
    assert describe_ranks(ranks, [3], []) == f"{line}; waiting: ranks 0-2, 4-5 (step 4, forward, parallel/x.py:3)"
    assert "behind: ranks 6-7 (never started)" in describe_ranks(ranks, [], [6, 7])


def test_restarted_ranks_find_only_ranks_of_the_same_launch(monkeypatch):
    """torchrun keeps its store when it restarts its workers. Rank 0 joins first in two launches, and last in one."""
    server = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))

    def generation(order):
        found = {}

        def come(rank):
            store = join_store(World(rank, 3, rank, 3), 60)
            store.set(f"{rank}", f"of rank {rank}")
            found[rank] = store

        threads = [threading.Thread(target=come, args=(rank,)) for rank in order]
        for thread in threads:
            assert 0 not in found  # which waits for all
            thread.start()
            time.sleep(0.5)
        for thread in threads:
            thread.join()
        return found

    for order in ([0, 1, 2], [0, 2, 1], [1, 2, 0]):
        stores = generation(order)
        assert all(store.get(str(rank)) == f"of rank {rank}".encode() for store in stores.values() for rank in order)
        assert not stores[0].check(["seen before"])
        stores[1].set("seen before", "")
        assert stores[2].check(["seen before"])


def test_ranks_that_never_start_are_named(monkeypatch):
    server = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TimeoutError, match="rank 0 waited 1 s for ranks 1, 2 to start"):
        join_store(World(0, 3), 1)
    del server
    with pytest.raises(TimeoutError, match=f"rank 1 cannot connect .* at localhost:{place['MASTER_PORT']}"):
        join_store(World(1, 3), 1)


# Launchers.


LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(worker.pid, worker.stdout.readline(), flush=True)
time.sleep(600)
"""
WORKER = """
import time
from trainer.fault_tolerance import launcher
launcher.{function}()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("function", ["die_with_parent", "watch_parent"])
def test_a_worker_does_not_outlive_its_launcher(function):
    command = [sys.executable, "-c", LAUNCHER, WORKER.format(function=function)]
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env) as launcher:
        pid, ready = launcher.stdout.readline().split()
        assert ready == "ready" and int(pid) in living_processes()
        launcher.kill()
    assert fault_cases.wait_for(lambda: int(pid) not in living_processes())


THREADS = """
import threading
import torch.distributed as dist
from trainer.fault_tolerance.launcher import exit_now


def ask(store):
    while True:
        store.check(["a key that does not exist"])

store = dist.TCPStore("localhost", 0, 1, True)
for _ in range(4):
    threading.Thread(target=ask, args=(store.clone(),), daemon=True).start()
print("output", end="")
exit_now(3)
"""


def test_exit_now_keeps_the_exit_code_while_threads_run():
    """With sys.exit(3) the process ends by SIGABRT: Python cannot end a thread that returns from C++."""
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (3, "output", "")
