"""Stops: from any rank, at any moment, told once or twice; what is left, and that a new start goes on from there."""

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
from tests.support.launched_runs import ROOT, count, hears, life, processes, torchrun
from trainer.checkpoint.folder import complete_checkpoints
from trainer.fault_tolerance.watchdog import TICK
from trainer.metrics import read_lines

SIGNALLED = "tests.support.fault_cases:signalled"
BUSY = ["eval.every=1", "eval.batches=all", "eval.final=all", "sample.every=2", "train.steps=8", "checkpoint.every=100"]
BUSY += ["run.name=stops"]


def evaluated(metrics):
    return [x["step"] for x in read_lines(metrics) if x["kind"] == "eval"]


# in a process of this test run: at what moment, and what is left


@pytest.fixture(scope="module")
def unbroken(corpus_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("unbroken")
    assert cases.run(corpus_dir, runs, *BUSY) == 0
    return runs / "stops"


MOMENTS = [("start", 0), ("train", 1), ("eval", 1), ("train", 4), ("eval", 6), ("train", 8), ("eval", 8)]


@pytest.mark.parametrize("world", [1, 2])
def test_stopped_at_any_moment_a_run_ends_as_if_never_stopped(pool, corpus_dir, tmp_path, unbroken, world):
    """Before the first step, in a step, in an evaluation, while sampling, and at the end: signals to one rank alone."""
    folder = tmp_path / "stops"
    for number, (kind, times) in enumerate(MOMENTS):
        words = dict(corpus=str(corpus_dir), runs=str(tmp_path), more=BUSY, rank=world - 1, kind=kind, times=times)
        words["number"] = (SIGTERM, SIGUSR1)[number % 2]
        codes = [fault_cases.signalled(**words)] if world == 1 else pool.run(world, SIGNALLED, **words)
        assert codes == [0] * world
        finished = any(x.get("event") == "finished" for x in read_lines(folder / "metrics.jsonl"))
        assert (folder / "requeue").exists() != finished
        assert kind != "start" or count(folder / "metrics.jsonl") == 0
    if not finished:  # the last signal may come when the run is over
        assert (
            fault_cases.signalled(**words | {"kind": "never"}) == 0
            if world == 1
            else pool.run(world, SIGNALLED, **words | {"kind": "never"}) == [0, 0]
        )
    assert not (folder / "requeue").exists()
    if world == 1:
        assert cases.losses(folder) == cases.losses(unbroken)
        assert cases.last_digest(folder) == cases.last_digest(unbroken)
    else:
        assert cases.losses(folder) == pytest.approx(cases.losses(unbroken), rel=1e-5)
    assert evaluated(folder / "metrics.jsonl") == evaluated(unbroken / "metrics.jsonl") == list(range(1, 9))
    names = [sorted(p.name for p in (f / "samples").iterdir()) for f in (folder, unbroken)]
    assert names[0] == names[1] and len(names[0]) == 4


PAUSES = [(1, "waiting for all ranks", []), (4, "evaluation", []), (70, "sampling", [2])]


@pytest.mark.parametrize("call, phase, lines", PAUSES)
def test_an_evaluation_and_a_sample_are_left_where_they_are(corpus_dir, tmp_path, monkeypatch, call, phase, lines):
    from trainer import loop

    calls, plain = [], loop.raise_if_stopped

    def raise_if_stopped(run):
        calls.append(run.watchdog.place.phase)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            assert fault_cases.wait_for(lambda: run.stop.asked)
        plain(run)

    monkeypatch.setattr(loop, "raise_if_stopped", raise_if_stopped)
    more = ["run.name=long", "train.steps=2", "eval.final=all", "train.micro_batch_size=1", "sample.max_new_tokens=30"]
    assert cases.run(corpus_dir, tmp_path, *more) == 0
    assert len(calls) == call and calls[-1] == phase
    assert evaluated(tmp_path / "long" / "metrics.jsonl") == lines
    assert (tmp_path / "long" / "requeue").exists() and not (tmp_path / "long" / "samples").exists()


def test_ctrl_c_leaves_no_mark_and_a_start_clears_one(corpus_dir, tmp_path):
    words = dict(corpus=str(corpus_dir), runs=str(tmp_path), more=["run.name=c"], rank=0, kind="train")
    assert fault_cases.signalled(**words, number=SIGUSR1, times=3) == 0
    assert "stopped at step" in (tmp_path / "c" / "requeue").read_text()
    assert fault_cases.signalled(**words, number=SIGINT, times=8) == 0
    assert not (tmp_path / "c" / "requeue").exists()
    events = [x for x in read_lines(tmp_path / "c" / "metrics.jsonl") if x.get("event") == "stopped"]
    assert [x["requeue"] for x in events] == [True, False]


# a second signal, or only a copy of the first


FLAG = """
import os, signal, time
from trainer.fault_tolerance.signals import StopFlag
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, also where this suite runs below it
with StopFlag() as stop:
    stop.stepped = True
    first = time.monotonic()
    for name, after in {signals}:
        time.sleep(max(0, first + after - time.monotonic()))
        os.kill(os.getpid(), getattr(signal, name))
    end = time.monotonic() + 10
    while not stop.asked and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.5)
    print(stop.asked, stop.requeue)
"""


@pytest.mark.parametrize(
    "signals, code, said",
    [
        ([("SIGTERM", 0)], 0, "True True"),
        ([("SIGINT", 0)], 0, "True False"),
        ([("SIGHUP", 0)], 0, "True False"),
        ([("SIGTERM", 0), ("SIGTERM", 0.5)], 0, "True True"),  # by srun and by torchrun
        ([("SIGUSR1", 0), ("SIGUSR1", 0.2), ("SIGTERM", 2.5), ("SIGTERM", 2.7)], 0, "True True"),  # a warning, then it
        ([("SIGTERM", 0), ("SIGTERM", 2.5)], 143, ""),
        ([("SIGINT", 0), ("SIGTERM", 2.5)], 143, ""),  # torchrun hears Ctrl-C twice
        ([("SIGINT", 0), ("SIGINT", 2.5)], 130, ""),
    ],
)
def test_which_signal_is_a_second_one(signals, code, said):
    words = [sys.executable, "-c", FLAG.format(signals=signals)]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (code, said), result.stderr
    assert ("again: ending at once" in result.stderr) == bool(code)


def test_a_signal_is_heard_deep_in_c_and_nohup_is_respected():
    """The main thread is in one long C call; SIGHUP was ignored when the process started."""
    code = (
        "import os, signal, threading, time; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from trainer.fault_tolerance.signals import StopFlag\n"
        "stop = StopFlag().listen(); os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.3); print(stop.asked)\n"
        "threading.Timer(0.5, lambda: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.5), print(stop.asked),"
        " os.kill(os.getpid(), signal.SIGKILL)]).start()\n"
        "import sys; sys.stdout.reconfigure(line_buffering=True); import ctypes; ctypes.CDLL(None).sleep(100)"
    )
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.split() == ["False", "True"]


# processes of their own


@pytest.mark.slow
def test_a_killed_rank_starts_again_and_a_stopped_run_does_not(corpus_dir, tmp_path):
    words = cases.words(corpus_dir, tmp_path, "run.name=k", "train.steps=100000", "checkpoint.every=5")
    metrics = tmp_path / "k" / "metrics.jsonl"
    with life(torchrun(words, "--max-restarts=3"), tmp_path / "life") as it:
        it.wait_for(lambda: count(metrics) >= 12, "12 steps")
        it.wait_for(lambda: complete_checkpoints(tmp_path / "k" / "checkpoints"), "a checkpoint")
        first = it.workers()
        os.kill(first[1], signal.SIGKILL)
        it.wait_for(lambda: "resumed from step" in it.out, "another start")
        assert "rank 1 is gone, killed or with its machine (last seen in step" in it.err
        assert it.out.startswith("new run\n")
        steps = count(metrics)
        it.wait_for(lambda: count(metrics) > steps + 2, "more steps")
        second = it.workers()
        assert not set(first) & set(second) and len(second) == 2
        for pid in (it.pid, *second):  # as a cluster does it: each worker gets it twice
            os.kill(pid, signal.SIGUSR1)
        with suppress(ProcessLookupError):
            os.kill(it.pid, signal.SIGTERM)
        assert it.ends() == 1
        assert it.out.count("resumed from step") == 1 and it.out.count("stopped at step") == 1
        assert "again: ending at once" not in it.err and "RankFailed" not in it.err
        assert not set(second) & set(processes())
    assert (tmp_path / "k" / "requeue").exists()
    saved = complete_checkpoints(tmp_path / "k" / "checkpoints")[-1].name
    assert int(saved[-8:]) == len(cases.losses(tmp_path / "k"))


@pytest.mark.slow
def test_a_signal_to_one_rank_during_the_start_ends_all(corpus_dir, tmp_path):
    words = cases.words(corpus_dir, tmp_path, "run.name=s", "train.steps=100000")
    with life(torchrun(words, "--max-restarts=3"), tmp_path / "life") as it:
        it.wait_for(lambda: len([pid for pid in it.workers() if hears(pid)]) == 2, "workers")
        os.kill(it.workers()[1], signal.SIGTERM)
        assert it.ends() == 0, it.err
        assert it.err.count("stopped before the first step") + it.out.count("stopped at step 0") == 1
        assert "Traceback" not in it.err
    assert (tmp_path / "s" / "requeue").exists() and count(tmp_path / "s" / "metrics.jsonl") == 0


def test_a_time_limit_before_the_first_step_leaves_no_mark(corpus_dir, tmp_path, monkeypatch, capfd):
    """It would be queued again, and get no further."""
    from trainer import startup

    build = startup.build

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return build(*args)

    monkeypatch.setattr(startup, "build", signalled)
    assert cases.run(corpus_dir, tmp_path, "run.name=u") == 0
    assert not (tmp_path / "u" / "requeue").exists() and count(tmp_path / "u" / "metrics.jsonl") == 0
    assert "SIGUSR1 before a step was done: not to be queued again" in capfd.readouterr().err


@pytest.mark.slow
def test_torchrun_does_not_start_a_users_mistake_again(tmp_path):
    with life(torchrun(["train.stps=3"], "--max-restarts=3"), tmp_path / "life") as it:
        assert it.ends() == 1
        assert it.err.count("train.stps: unknown key; did you mean train.steps?") == 1


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def by_hand(command, tmp_path, rank, port):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    env = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "localhost"}
    return life([sys.executable, *command], tmp_path / f"rank{rank}", **env)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_before_the_timeout(corpus_dir, tmp_path):
    words = cases.words(corpus_dir, tmp_path, "run.name=h", "train.steps=100000", "run.timeout=30")
    port, command = free_port(), ["-m", "trainer.main", *words]
    with by_hand(command, tmp_path, 0, port) as first, by_hand(command, tmp_path, 1, port) as second:
        first.wait_for(lambda: count(tmp_path / "h" / "metrics.jsonl") > 3, "steps")
        time.sleep(3 * TICK)  # until it has left a step in the store
        os.kill(second.pid, signal.SIGSTOP)
        assert first.ends() == 1
        line = first.err.strip().splitlines()[-1]
        assert "no rank has moved for" in line and "(run.timeout=30)" in line and line.startswith("step ")
        assert "behind: rank 1 (step" in line and "no sign of life" in line and "waiting: rank 0 (step" in line


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_the_others_with_its_line(corpus_dir, tmp_path):
    words = cases.words(corpus_dir, tmp_path, "run.name=e", "train.steps=100000", "data.workers=0")
    code = (
        "import sys; from tests.support.fault_cases import fail_at; from trainer.main import guarded, main\n"
        "if '{rank}' == '1': fail_at(5, ValueError('no such row'))\n"
        "sys.exit(guarded(lambda: main(sys.argv[1:])))"
    )
    port = free_port()
    commands = [["-c", code.format(rank=rank), *words] for rank in (0, 1)]
    with by_hand(commands[0], tmp_path, 0, port) as first, by_hand(commands[1], tmp_path, 1, port) as second:
        assert (first.ends(), second.ends()) == (1, 1)
        assert "Traceback" in second.err and "ValueError: no such row" in second.err
        assert first.err.strip().splitlines()[-1] == "rank 1 failed: ValueError: no such row (step 6, data)"
        assert "Traceback" not in first.err


# a terminal


def in_a_terminal(command, env, event, key):
    """Runs a command in a terminal and presses a key as soon as `event`: its end, its output, whether all is as before.

    Events are waited for; the time limit catches what hangs.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, those of a terminal do not
        os.execvpe(command[0], command, {**os.environ, **env})
    os.set_blocking(terminal, False)
    termios.tcsetwinsize(terminal, (40, 200))
    before, out, pressed, end = termios.tcgetattr(terminal), b"", False, time.monotonic() + 240
    while time.monotonic() < end:
        try:
            while piece := os.read(terminal, 65536):
                out += piece
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # the last process that had it open is gone
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
@pytest.mark.parametrize("way", ["make", "python"])
def test_ctrl_c_in_a_terminal_saves_and_leaves_it_clean(corpus_dir, tmp_path, way):
    words = cases.words(corpus_dir, tmp_path, "run.name=t", "train.steps=100000")
    command = [sys.executable, "-m", "trainer.main", *words]
    if way == "make":  # -o: the environment is as new as it need be
        command = ["make", "--no-print-directory", "-o", ".venv/installed-dev", f"python={sys.executable}", "train"]
        command.append(f"ARGS={' '.join(words)}")
    metrics = tmp_path / "t" / "metrics.jsonl"
    env = {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    status, out, clean = in_a_terminal(command, env, lambda: count(metrics) >= 3, b"\x03")
    assert clean and "Traceback" not in out and "Error" not in out
    step = len(cases.losses(tmp_path / "t"))
    assert last_line(out).startswith(f"stopped at step {step} of 100000, saved at {step}; to resume: ")
    assert out.endswith("\r\n") and "Ctrl-C: saving after this step" in out
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGINT if way == "make" else 0)  # as make itself ends
    assert not (tmp_path / "t" / "requeue").exists()
