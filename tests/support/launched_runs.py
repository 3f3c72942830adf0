"""Runs in separate processes, which tests may signal and kill. Tests wait for events, never for a number of seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.metrics import read_lines

ROOT = Path(__file__).parents[2]
EVENT_TIMEOUT_S = 240  # until a test fails, on a machine that other processes keep busy
FLAGS = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1", "--shutdown-timeout=120"]


class LaunchedRun:
    """One start of a command. It has its own session, and its output goes to files."""

    def __init__(self, command: list[str], out: Path, **env: str) -> None:
        self.out_path, self.err_path = out.with_suffix(".out"), out.with_suffix(".err")
        environment = {"LOGLEVEL": "ERROR", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **os.environ, **env}
        with open(self.out_path, "wb") as stdout, open(self.err_path, "wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self.out_path.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.err_path.read_text(errors="replace")

    def wait_for(self, event: Callable[[], Any], name: str = "event", interval: float = 0.02) -> Any:
        """Wait until `event` returns a true value, and return it. Fails if the process ends before.

        `event` is called every `interval` seconds.
        """
        end = time.monotonic() + EVENT_TIMEOUT_S
        while not (value := event()):
            if self.process.poll() is not None:
                value = event()
                assert value, f"ended with {self.process.returncode} before: {name}\n{self.out}\n{self.err}"
                return value
            assert time.monotonic() < end, f"timed out waiting for: {name}\n{self.out}\n{self.err}"
            time.sleep(interval)
        return value

    def wait(self) -> int:
        """Wait until the process ends. Returns the exit code."""
        try:
            return self.process.wait(EVENT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs\n{self.out}\n{self.err}") from None

    def workers(self) -> list[int]:
        """The ids of the living child processes, by rank, because torchrun starts them in order."""
        return sorted(pid for pid, parent in living_processes().items() if parent == self.pid)


@contextmanager
def launched_run(command: list[str], out: Path, **env: str) -> Iterator[LaunchedRun]:
    """A LaunchedRun whose processes are killed at the end."""
    run = LaunchedRun(command, out, **env)
    try:
        yield run
    finally:
        workers = run.workers() if run.process.poll() is None else []
        for pid in [run.pid, *workers]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


def torchrun(arguments: list[str], *flags: str, ranks: int = 2) -> list[str]:
    """The command that trains on `ranks` processes of this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *FLAGS]
    return [*launch, *flags, "-m", "trainer.main", *arguments]


def living_processes() -> dict[int, int]:
    """The parent's id of each living process, by process id. Zombies are omitted."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def handles_signals(pid: int) -> bool:
    """Whether a process runs the trainer and has a handler for SIGUSR1, as it has from its first moments on.

    A fork of torchrun that does not run the trainer yet has torchrun's handlers and command line. It would lose a
    signal.
    """
    with suppress(OSError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if _command(pid) == _command(parent):
            return False
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                caught = int(line.split()[1], 16)
                return bool(caught >> (signal.SIGUSR1 - 1) & 1)
    return False


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def count_lines(metrics: Path, kind: str = "train") -> int:
    """The number of lines of one kind, or of one event, in a metrics file."""
    return sum(line["kind"] == kind or line.get("event") == kind for line in read_lines(metrics))
