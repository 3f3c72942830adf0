"""Signals to any rank, at any moment, once or twice: the run saves and ends, and the next start resumes it."""

import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest

from tests.support import fault_cases
from tests.support import run_cases as cases
from tests.support.fault_cases import SIGINT, SIGTERM, SIGUSR1
from tests.support.launched_runs import (
    ROOT,
    count_lines,
    handles_signals,
    launched_run,
    living_processes,
    torchrun,
)
from trainer.checkpoint.folder import complete_checkpoints
from trainer.fault_tolerance.watchdog import CHECK_INTERVAL_S
from trainer.metrics import read_lines

SIGNALLED = "tests.support.fault_cases:run_with_signal"
BUSY = ["eval.every=1", "eval.batches=all", "eval.final=all", "sample.every=2", "train.steps=8", "checkpoint.every=100"]
BUSY += ["run.name=stops"]


def evaluated_steps(metrics):
    return [x["step"] for x in read_lines(metrics) if x["kind"] == "eval"]


# Signals at chosen moments, to runs in processes of this test run.


@pytest.fixture(scope="module")
def uninterrupted(corpus_dir, tmp_path_factory):
    """The folder of the same run without a signal."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    assert cases.run(corpus_dir, runs, *BUSY) == 0
    return runs / "stops"


# The signal comes as soon as metrics.jsonl has this number of lines of this kind.
MOMENTS = [("start", 0), ("train", 1), ("eval", 1), ("train", 4), ("eval", 6), ("train", 8), ("eval", 8)]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_stopped_at_any_moment_ends_as_if_never_stopped(pool, corpus_dir, tmp_path, uninterrupted, world):
    """Signals to one rank: before the first step, in a step, in an evaluation, while sampling, and at the end."""
    folder = tmp_path / "stops"

    def start(kind, times, number):
        keys = dict(corpus=str(corpus_dir), runs=str(tmp_path), more=BUSY, rank=world - 1)
        keys |= dict(kind=kind, times=times, number=number)
        codes = [fault_cases.run_with_signal(**keys)] if world == 1 else pool.run(world, SIGNALLED, **keys)
        assert codes == [0] * world

    for index, (kind, times) in enumerate(MOMENTS):
        start(kind, times, (SIGTERM, SIGUSR1)[index % 2])
        finished = any(x.get("event") == "finished" for x in read_lines(folder / "metrics.jsonl"))
        assert (folder / "requeue").exists() != finished
        assert kind != "start" or count_lines(folder / "metrics.jsonl") == 0
    if not finished:  # the last signal may come after the end of the run
        start("never", 1, SIGTERM)
    assert not (folder / "requeue").exists()
    if world == 1:
        assert cases.losses(folder) == cases.losses(uninterrupted)
        assert cases.last_digest(folder) == cases.last_digest(uninterrupted)
    else:
        assert cases.losses(folder) == pytest.approx(cases.losses(uninterrupted), rel=1e-5)
    for run in (folder, uninterrupted):
        assert evaluated_steps(run / "metrics.jsonl") == list(range(1, 9))
    samples, expected = (sorted(p.name for p in (run / "samples").iterdir()) for run in (folder, uninterrupted))
    assert samples == expected and len(samples) == 4


# At which call of `raise_if_stopped` the signal comes, the phase then, and the steps evaluated before the end.
INTERRUPTIONS = [(1, "waiting for all ranks", []), (4, "evaluation", []), (70, "sampling", [2])]


@pytest.mark.parametrize("call, phase, evaluated", INTERRUPTIONS)
def test_a_stop_interrupts_evaluations_and_samples(corpus_dir, tmp_path, monkeypatch, call, phase, evaluated):
    from trainer import loop

    calls, plain = [], loop.raise_if_stopped

    def raise_if_stopped(run):
        calls.append(run.watchdog.progress.phase)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            assert fault_cases.wait_for(lambda: run.stop.requested)
        plain(run)

    monkeypatch.setattr(loop, "raise_if_stopped", raise_if_stopped)
    more = ["run.name=long", "train.steps=2", "eval.final=all", "train.micro_batch_size=1", "sample.max_new_tokens=30"]
    assert cases.run(corpus_dir, tmp_path, *more) == 0
    assert len(calls) == call and calls[-1] == phase
    assert evaluated_steps(tmp_path / "long" / "metrics.jsonl") == evaluated
    assert (tmp_path / "long" / "requeue").exists() and not (tmp_path / "long" / "samples").exists()


def test_ctrl_c_writes_no_requeue_file_and_a_start_removes_it(corpus_dir, tmp_path):
    words = dict(corpus=str(corpus_dir), runs=str(tmp_path), more=["run.name=c"], rank=0, kind="train")
    assert fault_cases.run_with_signal(**words, number=SIGUSR1, times=3) == 0
    assert "stopped at step" in (tmp_path / "c" / "requeue").read_text()
    assert fault_cases.run_with_signal(**words, number=SIGINT, times=8) == 0
    assert not (tmp_path / "c" / "requeue").exists()
    events = [x for x in read_lines(tmp_path / "c" / "metrics.jsonl") if x.get("event") == "stopped"]
    assert [x["requeue"] for x in events] == [True, False]


# Which signals count as a second one, and which as a copy of the first.


FLAG = """
import os, signal, time
from trainer.fault_tolerance.signals import StopFlag
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored if this test suite runs under nohup
with StopFlag() as stop:
    stop.step_done = True
    first = time.monotonic()
    for name, after in {signals}:
        time.sleep(max(0, first + after - time.monotonic()))
        os.kill(os.getpid(), getattr(signal, name))
    end = time.monotonic() + 10
    while not stop.requested and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.5)
    print(stop.requested, stop.requeue)
"""


@pytest.mark.parametrize(
    "signals, code, output",
    [
        ([("SIGTERM", 0)], 0, "True True"),
        ([("SIGINT", 0)], 0, "True False"),
        ([("SIGHUP", 0)], 0, "True False"),
        ([("SIGTERM", 0), ("SIGTERM", 0.5)], 0, "True True"),  # a copy: from srun and from torchrun
        ([("SIGUSR1", 0), ("SIGUSR1", 0.2), ("SIGTERM", 2.5), ("SIGTERM", 2.7)], 0, "True True"),  # warning, then stop
        ([("SIGTERM", 0), ("SIGTERM", 2.5)], 143, ""),
        ([("SIGINT", 0), ("SIGTERM", 2.5)], 143, ""),  # torchrun receives Ctrl-C twice
        ([("SIGINT", 0), ("SIGINT", 2.5)], 130, ""),
    ],
)
def test_a_second_signal_is_distinguished_from_a_copy(signals, code, output):
    words = [sys.executable, "-c", FLAG.format(signals=signals)]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (code, output), result.stderr
    assert ("ending at once, without saving" in result.stderr) == bool(code)


def test_signals_are_received_in_c_code_and_nohup_is_respected():
    """The main thread is in a long C call. SIGHUP was ignored when the process started."""
    code = (
        "import os, signal, threading, time; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from trainer.fault_tolerance.signals import StopFlag\n"
        "stop = StopFlag().listen(); os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.3); print(stop.requested)\n"
        "threading.Timer(0.5, lambda: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.5), print(stop.requested),"
        " os.kill(os.getpid(), signal.SIGKILL)]).start()\n"
        "import sys; sys.stdout.reconfigure(line_buffering=True); import ctypes; ctypes.CDLL(None).sleep(100)"
    )
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.split() == ["False", "True"]


# Runs in separate processes.


@pytest.mark.slow
def test_torchrun_restarts_killed_ranks_but_no_stopped_run(corpus_dir, tmp_path):
    words = cases.run_arguments(corpus_dir, tmp_path, "run.name=k", "train.steps=100000", "checkpoint.every=5")
    metrics = tmp_path / "k" / "metrics.jsonl"
    with launched_run(torchrun(words, "--max-restarts=3"), tmp_path / "run") as run:
        run.wait_for(lambda: count_lines(metrics) >= 12, "12 steps")
        run.wait_for(lambda: complete_checkpoints(tmp_path / "k" / "checkpoints"), "a checkpoint")
        first = run.workers()
        os.kill(first[1], signal.SIGKILL)
        run.wait_for(lambda: "resumed from step" in run.out, "another start")
        assert "rank 1 is gone: it was killed, or its machine failed (last seen in step" in run.err
        assert run.out.startswith("new run\n")
        steps = count_lines(metrics)
        run.wait_for(lambda: count_lines(metrics) > steps + 2, "more steps")
        second = run.workers()
        assert not set(first) & set(second) and len(second) == 2
        for pid in (run.pid, *second):  # as a cluster does: each worker receives it twice
            os.kill(pid, signal.SIGUSR1)
        with suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGTERM)
        assert run.wait() == 1
        assert run.out.count("resumed from step") == 1 and run.out.count("stopped at step") == 1
        assert "ending at once, without saving" not in run.err and "RankFailed" not in run.err
        assert not set(second) & set(living_processes())
    assert (tmp_path / "k" / "requeue").exists()
    saved = complete_checkpoints(tmp_path / "k" / "checkpoints")[-1].name
    assert int(saved[-8:]) == len(cases.losses(tmp_path / "k"))


@pytest.mark.slow
def test_a_signal_to_one_rank_during_the_start_ends_all(corpus_dir, tmp_path):
    words = cases.run_arguments(corpus_dir, tmp_path, "run.name=s", "train.steps=100000")
    with launched_run(torchrun(words, "--max-restarts=3"), tmp_path / "run") as run:
        run.wait_for(lambda: len([pid for pid in run.workers() if handles_signals(pid)]) == 2, "workers")
        os.kill(run.workers()[1], signal.SIGTERM)
        assert run.wait() == 0, run.err
        assert run.err.count("stopped before the first step") + run.out.count("stopped at step 0") == 1
        assert "Traceback" not in run.err
    assert (tmp_path / "s" / "requeue").exists() and count_lines(tmp_path / "s" / "metrics.jsonl") == 0


def test_a_time_limit_before_the_first_step_does_not_requeue(corpus_dir, tmp_path, monkeypatch, capfd):
    """The job would be requeued again and again, and get no further."""
    from trainer import startup

    build = startup.build

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return build(*args)

    monkeypatch.setattr(startup, "build", signalled)
    assert cases.run(corpus_dir, tmp_path, "run.name=u") == 0
    assert not (tmp_path / "u" / "requeue").exists() and count_lines(tmp_path / "u" / "metrics.jsonl") == 0
    assert "SIGUSR1 before the first step was done: the job is not requeued" in capfd.readouterr().err


@pytest.mark.slow
def test_torchrun_does_not_restart_after_a_users_mistake(tmp_path):
    with launched_run(torchrun(["train.stps=3"], "--max-restarts=3"), tmp_path / "run") as run:
        assert run.wait() == 1
        assert run.err.count("train.stps: unknown key; did you mean train.steps?") == 1


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def launched_rank(command, tmp_path, rank, port):
    """One of two ranks, started without torchrun."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    env = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "localhost"}
    return launched_run([sys.executable, *command], tmp_path / f"rank{rank}", **env)


@pytest.mark.slow
def test_a_suspended_rank_is_named_before_the_timeout(corpus_dir, tmp_path):
    words = cases.run_arguments(corpus_dir, tmp_path, "run.name=h", "train.steps=100000", "run.timeout=30")
    port, command = free_port(), ["-m", "trainer.main", *words]
    with launched_rank(command, tmp_path, 0, port) as first, launched_rank(command, tmp_path, 1, port) as second:
        first.wait_for(lambda: count_lines(tmp_path / "h" / "metrics.jsonl") > 3, "steps")
        time.sleep(3 * CHECK_INTERVAL_S)  # until its step is in the store
        os.kill(second.pid, signal.SIGSTOP)
        assert first.wait() == 1
        line = first.err.strip().splitlines()[-1]
        assert "no rank has made progress for" in line and "(run.timeout=30)" in line and line.startswith("step ")
        assert "behind: rank 1 (step" in line and "not responding" in line and "waiting: rank 0 (step" in line


@pytest.mark.slow
def test_an_exception_on_one_rank_is_the_other_ranks_error(corpus_dir, tmp_path):
    words = cases.run_arguments(corpus_dir, tmp_path, "run.name=e", "train.steps=100000", "data.workers=0")
    code = (
        "import sys; from tests.support.fault_cases import fail_at_step; from trainer.main import guarded, main\n"
        "if '{rank}' == '1': fail_at_step(5, ValueError('no such row'))\n"
        "sys.exit(guarded(lambda: main(sys.argv[1:])))"
    )
    port = free_port()
    commands = [["-c", code.format(rank=rank), *words] for rank in (0, 1)]
    with (
        launched_rank(commands[0], tmp_path, 0, port) as first,
        launched_rank(commands[1], tmp_path, 1, port) as second,
    ):
        assert (first.wait(), second.wait()) == (1, 1)
        assert "Traceback" in second.err and "ValueError: no such row" in second.err
        assert first.err.strip().splitlines()[-1] == "rank 1 failed: ValueError: no such row (step 6, data)"
        assert "Traceback" not in first.err


# A terminal.


def in_a_terminal(command, env, event, key):
    """Run a command in a terminal, and press a key as soon as `event` returns true.

    Returns the exit status, the output, and whether the terminal's settings are as before.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, jobs in a terminal do not
        os.execvpe(command[0], command, {**os.environ, **env})
    os.set_blocking(terminal, False)
    termios.tcsetwinsize(terminal, (40, 200))
    before, out, pressed, end = termios.tcgetattr(terminal), b"", False, time.monotonic() + 240
    while time.monotonic() < end:
        try:
            while chunk := os.read(terminal, 65536):
                out += chunk
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # the last process that had it open has ended
            break
        if not pressed and event():
            os.write(terminal, key)
            pressed = True
    after = termios.tcgetattr(terminal)
    os.close(terminal)
    return os.waitpid(pid, 0)[1], out.decode(errors="replace"), before == after


def last_line(out):
    return out.replace("\r", "\n").strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["make", "python"])
def test_ctrl_c_in_a_terminal_saves_and_leaves_it_clean(corpus_dir, tmp_path, program):
    words = cases.run_arguments(corpus_dir, tmp_path, "run.name=t", "train.steps=100000")
    command = [sys.executable, "-m", "trainer.main", *words]
    if program == "make":  # -o: treat the environment as up to date
        command = ["make", "--no-print-directory", "-o", ".venv/installed-dev", f"python={sys.executable}", "train"]
        command.append(f"ARGS={' '.join(words)}")
    metrics = tmp_path / "t" / "metrics.jsonl"
    env = {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    status, out, clean = in_a_terminal(command, env, lambda: count_lines(metrics) >= 3, b"\x03")
    assert clean and "Traceback" not in out and "Error" not in out
    step = len(cases.losses(tmp_path / "t"))
    assert last_line(out).startswith(f"stopped at step {step} of 100000, saved at {step}; to resume: ")
    assert out.endswith("\r\n") and "Ctrl-C: saving a checkpoint after this step" in out
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGINT if program == "make" else 0)  # make ends itself so
    assert not (tmp_path / "t" / "requeue").exists()
