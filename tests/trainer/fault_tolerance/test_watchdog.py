"""Faults of a run: what is skipped, what is said, what is kept, and who is named."""

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.settings import UserError
from parallel.mesh import World
from parallel.rendezvous import join_store
from tests.support import fault_cases
from tests.support import run_cases as cases
from trainer.checkpoint.folder import complete_checkpoints
from trainer.config import LogConfig
from trainer.fault_tolerance.errors import Stopped, memory_error
from trainer.fault_tolerance.signals import StopFlag
from trainer.fault_tolerance.watchdog import Place, Watchdog, compare
from trainer.metrics import Reporter, read_lines
from trainer.spikes import Spikes

ROOT = Path(__file__).parents[3]
POISONED = "tests.support.fault_cases:poisoned"


# gradients and losses


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_rank_moves_nothing_on_any(pool, corpus_dir, tmp_path, what):
    more = ["run.name=nan", "train.steps=6", "checkpoint.every=1", "checkpoint.keep=9"]
    told = pool.run(2, POISONED, corpus=str(corpus_dir), runs=str(tmp_path), more=more, rank=1, what=what, at=[4])
    for steps in told:
        assert [x["moved"] for x in steps] == [True, True, True, False, True, True]
        assert [x["skipped"] for x in steps] == [0, 0, 0, 1, 0, 0]
        assert steps[3]["tokens"] > steps[2]["tokens"]  # the data has moved on
    lines = read_lines(tmp_path / "nan" / "metrics.jsonl")
    skipped = [x for x in lines if x.get("event") == "skipped"]
    assert [x["step"] for x in skipped] == [4] and skipped[0]["grad_norm"] in ("nan", "inf")
    assert (skipped[0]["loss"] == "nan") == (what == "loss")
    assert [x["step"] for x in lines if x["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_an_infinity_on_one_rank_halves_the_scale_of_fp16_on_all(pool, corpus_dir, tmp_path):
    words = dict(corpus=str(corpus_dir), runs=str(tmp_path), rank=1, what="gradient", at=[2])
    more = ["run.name=inf", "train.steps=3", "train.dtype=float16"]
    for steps in pool.run(2, POISONED, **words, more=more):
        assert [(x["moved"], x["scale"]) for x in steps] == [(True, 2**16), (False, 2**15), (True, 2**15)]


def test_too_many_skipped_steps_end_the_run_with_the_last_good_checkpoint(corpus_dir, tmp_path):
    more = ["run.name=nan", "checkpoint.every=1", "checkpoint.keep=1", "train.max_skipped=3"]
    told = fault_cases.poisoned(str(corpus_dir), str(tmp_path), more, 0, "loss", list(range(4, 99)))
    assert len(told) == 7 and told[-1]["error"].startswith("train.max_skipped=3: so many steps in a row")
    assert told[-1]["error"].endswith("from step 3") and "train.max_lr" in told[-1]["error"]
    assert [p.name for p in complete_checkpoints(tmp_path / "nan" / "checkpoints")] == ["step-00000003"]
    assert cases.run(corpus_dir, tmp_path, *more) == 0  # the cause is gone
    assert len(cases.losses(tmp_path / "nan")) == 20


def test_a_last_step_that_is_skipped_still_ends_the_run(corpus_dir, tmp_path):
    more = ["run.name=nan", "train.steps=4", "checkpoint.every=1"]
    fault_cases.poisoned(str(corpus_dir), str(tmp_path), more, 0, "gradient", [4])
    assert complete_checkpoints(tmp_path / "nan" / "checkpoints")[-1].name == "step-00000004"


def test_a_spike_is_told_once():
    spikes, noise = Spikes(), torch.Generator().manual_seed(0)
    falling = [6 * 0.99**n + float(torch.randn((), generator=noise)) * 0.1 for n in range(400)]
    assert [spikes.usual(x) for x in falling] == [None] * 400
    usual = spikes.usual(3.0)
    assert usual is not None and abs(usual) < 1.0
    assert spikes.usual(3.0) is None and spikes.usual(0.1) is None
    assert spikes.usual(3.0) is not None


def test_a_spike_is_reported(corpus_dir, tmp_path, capsys, monkeypatch):
    from model import transformer

    plain, calls = transformer.linear_cross_entropy, []

    def jumping(hidden, weight, targets):
        calls.append(1)
        return plain(hidden, weight, targets) * (5.0 if 30 * 3 < len(calls) <= 31 * 3 else 1.0)

    monkeypatch.setattr(transformer, "linear_cross_entropy", jumping)
    assert cases.run(corpus_dir, tmp_path, "run.name=spike", "train.steps=40") == 0
    events = [x for x in read_lines(tmp_path / "spike" / "metrics.jsonl") if x.get("event") == "spike"]
    assert [x["step"] for x in events] == [31] and events[0]["loss"] > 3 * events[0]["usual"]
    assert capsys.readouterr().out.count("step 31: loss") == 1


# memory and disk


def test_a_model_without_room_ends_in_one_line(corpus_dir, tmp_path):
    with pytest.raises(UserError, match="out of memory while building the model.*--dry-run") as error:
        cases.run(corpus_dir, tmp_path, "model.expert_dim=17592186044416")
    assert "\n" not in str(error.value)


def test_a_step_without_room_names_the_settings_that_help():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    line = memory_error(error.value, "backward", 7, 16, 1024)
    assert "out of memory in step 7, backward: lower train.micro_batch_size=16 or data.seq_len=1024" in str(line)
    assert memory_error(MemoryError(), "data", 1, 1, 1) and memory_error(torch.OutOfMemoryError("CUDA"), "x", 1, 1, 1)
    assert memory_error(RuntimeError("shapes"), "forward", 1, 1, 1) is None


def test_a_full_disk_costs_lines_but_not_the_run(tmp_path, capsys):
    """The limit of a file's size is to a process as a full disk."""
    reporter = Reporter(tmp_path, LogConfig(wandb="disabled"), "full", True)
    reporter.write("train", 1, loss=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        for step in (2, 3):
            reporter.write("train", step, loss=1.0)
        reporter.write_text(tmp_path / "samples" / "a.txt", "long " * 100)
        reporter.event(3, "too long for what is left of the disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reporter.write("train", 4, loss=1.0)
    assert [x["step"] for x in read_lines(tmp_path / "metrics.jsonl")] == [1, 4]  # and none of them torn
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    out = capsys.readouterr().out
    assert out.count("cannot be written") == 1 and "going on without" in out


# ranks that fail, hang, or never come


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


class Recorded(Watchdog):
    """A watchdog whose process goes on."""

    line = ""

    def _end(self, line, code):
        self.line = line
        self.close()


@pytest.fixture
def starting(tmp_path):
    """Two ranks' watches over a real store, in this process, before the first step."""
    store = dist.FileStore(str(tmp_path / "store"), 2)
    both = [Recorded(rank, 2, StopFlag(), 6, tmp_path / "run") for rank in (0, 1)]
    for watchdog in both:
        watchdog.mark("loading the checkpoint")
        watchdog.begin(store)
    yield both
    for watchdog in both:
        watchdog.close()


@pytest.fixture
def watches(starting):
    """The same, in their steps."""
    for watchdog in starting:
        watchdog.enter()
    return starting


@pytest.mark.parametrize("requeue", [True, False])
def test_before_the_first_step_all_end_when_one_is_asked_to(starting, requeue, capfd):
    first, second = starting
    second.stop.asked, second.stop.requeue = True, requeue
    for watchdog in starting:
        assert fault_cases.wait_for(lambda watchdog=watchdog: watchdog._ended is not None)
        with pytest.raises(Stopped):
            watchdog.mark("building the model")
        assert isinstance(watchdog.verdict(LOST), Stopped)  # the other is gone already
    assert capfd.readouterr().err == "stopped before the first step\n"
    assert (first.folder / "requeue").exists() == requeue
    with pytest.raises(Stopped):
        first.enter()


def test_a_rank_that_does_not_answer_keeps_all_from_ending_before_the_first_step(starting):
    """A rank that died is why torchrun sends SIGTERM to the rest: that is no stop, and leaves no mark."""
    first, second = starting
    second.close()
    time.sleep(0.5)
    first.stop.asked = first.stop.requeue = True
    time.sleep(1)
    first.mark("building the model")
    assert not first.folder.exists()


def test_the_first_error_of_any_rank_is_what_the_others_end_with(watches, monkeypatch):
    monkeypatch.setattr("trainer.fault_tolerance.watchdog.GRACE", 2)
    first, second = watches
    second.mark("data", 6)
    error = ValueError("no\nsuch row")
    assert second.verdict(error) is error
    line = "rank 1 failed: ValueError: no such row (step 6, data)"
    assert str(first.verdict(LOST)) == line and first.verdict(LOST).code == 1
    first._deadline = None  # as if its main thread waited in C++ for what does not come
    assert fault_cases.wait_for(lambda: first.line == line)


def test_a_users_mistake_on_another_rank_is_told_by_rank_0(watches):
    first, second = watches
    error = UserError("x.y=1: no")
    assert second.verdict(error) is error
    told = first.verdict(LOST)
    assert str(told) == "rank 1: x.y=1: no" and told.code == 2


def test_a_rank_that_was_killed_is_named(watches):
    first, second = watches
    with subprocess.Popen(["true"]) as process:
        process.wait()
    second.place.pid = process.pid
    first.mark("forward", 7)
    second.mark("backward", 6)
    time.sleep(1.5)  # until it is in the store
    assert str(first.verdict(LOST)) == (
        "step 7, forward: rank 1 is gone, killed or with its machine (last seen in step 6, backward)"
    )


def test_an_error_of_its_own_is_kept(watches):
    error = ValueError("mine")
    assert watches[0].verdict(error) is error


def test_a_rank_that_hangs_is_named_by_the_others(watches):
    first, second = watches
    second.mark("data", 12)
    for phase in ("data", "forward"):
        first.mark(phase, 12)
    assert fault_cases.wait_for(lambda: first.line and second.line)
    for watchdog in watches:
        assert "no rank has moved for" in watchdog.line and "(run.timeout=6)" in watchdog.line
        assert "behind: rank 1 (step 12, data" in watchdog.line and "waiting: rank 0 (step 12, forward" in watchdog.line


def test_a_rank_that_is_slow_but_alive_is_waited_for(watches):
    first, second = watches
    end = time.monotonic() + 12  # twice run.timeout, which none of them is without a sign
    first.mark("saving", 3)
    while time.monotonic() < end:
        second.mark("evaluation", 3)
        time.sleep(0.3)
    assert not first.line and not second.line


@pytest.fixture
def at_work(monkeypatch):
    """This process uses a whole core, as one does that builds a model, and one that waits for NCCL or a GPU."""
    monkeypatch.setattr("trainer.fault_tolerance.watchdog.time.process_time", time.monotonic)


@pytest.mark.parametrize("phase, step", [("connecting", None), ("forward", 1), ("the step's message", 1)])
def test_ranks_that_spin_in_their_first_messages_hang(starting, at_work, phase, step):
    for watchdog in starting:
        watchdog.mark(phase, step)
        if step:
            watchdog.enter()
    assert fault_cases.wait_for(lambda: all(watchdog.line for watchdog in starting), 30)
    for watchdog in starting:
        assert "no rank has moved for" in watchdog.line and "none is behind; waiting: ranks 0-1" in watchdog.line


def test_a_model_that_takes_long_to_build_is_no_hang(starting, at_work):
    for watchdog in starting:
        watchdog.mark("building the model")
    time.sleep(9)  # 1.5 times run.timeout
    assert not any(watchdog.line for watchdog in starting)


def test_the_line_groups_ranks():
    places = {rank: Place(4, "forward", 10, line="parallel/x.py:3") for rank in range(6)}
    assert compare(places, [], []) == "none is behind; waiting: ranks 0-5 (step 4, forward, parallel/x.py:3)"
    places[3] = Place(4, "data", 9)
    line = "behind: rank 3 (step 4, data, no sign of life)"
    assert compare(places, [3], []) == f"{line}; waiting: ranks 0-2, 4-5 (step 4, forward, parallel/x.py:3)"
    assert "behind: ranks 6-7 (never started)" in compare(places, [], [6, 7])


def test_ranks_of_a_life_find_one_another_and_nobody_of_the_life_before(monkeypatch):
    """torchrun keeps its store when it starts its workers again; of the second life rank 0 is the first to come."""
    server = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))

    def life(order):
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
        stores = life(order)
        assert all(store.get(str(rank)) == f"of rank {rank}".encode() for store in stores.values() for rank in order)
        assert not stores[0].check(["seen before"])
        stores[1].set("seen before", "")
        assert stores[2].check(["seen before"])


def test_ranks_that_do_not_come_are_named(monkeypatch):
    server = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TimeoutError, match="rank 0 waited 1 s for ranks 1, 2 to start"):
        join_store(World(0, 3), 1)
    del server
    with pytest.raises(TimeoutError, match=f"rank 1 cannot connect .* at localhost:{place['MASTER_PORT']}"):
        join_store(World(1, 3), 1)


# launchers


LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(worker.pid, worker.stdout.readline(), flush=True)
time.sleep(600)
"""
WORKER = "import time; from trainer import faults; {}; print('ready', flush=True); time.sleep(600)"


@pytest.mark.parametrize("bound", ["die_with_parent()", "watch_parent()"])
def test_a_worker_does_not_outlive_its_launcher(bound):
    from tests.support.launched_runs import processes

    command = [sys.executable, "-c", LAUNCHER, WORKER.format(bound)]
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env) as launcher:
        pid, ready = launcher.stdout.readline().split()
        assert ready == "ready" and int(pid) in processes()
        launcher.kill()
    assert fault_cases.wait_for(lambda: int(pid) not in processes())


THREADS = """
import threading
import torch.distributed as dist


def ask(store):
    while True:
        store.check(["what nobody sets"])

store = dist.TCPStore("localhost", 0, 1, True)
for _ in range(4):
    threading.Thread(target=ask, args=(store.clone(),), daemon=True).start()
print("said", end="")
exit_now(3)
"""


def test_a_process_ends_with_its_code_whatever_its_threads_do():
    """With sys.exit(3) it ends by SIGABRT: Python cannot end a thread that comes back from C++."""
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (3, "said", "")
