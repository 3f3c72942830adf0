"""Runs in processes of their own, that tests may signal and kill: events are waited for, never seconds."""

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
PATIENCE = 240  # seconds until a test gives up, on a machine that others keep busy
FLAGS = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1", "--shutdown-timeout=120"]


class Life:
    """One start of a command, with its output in files, in a session of its own."""

    def __init__(self, command: list[str], out: Path, terminal: int | None = None, **env: str) -> None:
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

    def wait_for(self, event: Callable[[], Any], what: str = "event", every: float = 0.02) -> Any:
        """What `event` returns, once it is true; looked at every so many seconds."""
        end = time.monotonic() + PATIENCE
        while not (value := event()):
            if self.process.poll() is not None:
                value = event()
                assert value, f"ended with {self.process.returncode} before: {what}\n{self.out}\n{self.err}"
                return value
            assert time.monotonic() < end, f"waited in vain for: {what}\n{self.out}\n{self.err}"
            time.sleep(every)
        return value

    def ends(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs\n{self.out}\n{self.err}") from None

    def workers(self) -> list[int]:
        """The living children, by rank as torchrun starts them in order."""
        return sorted(pid for pid, (parent, _) in processes().items() if parent == self.pid)


@contextmanager
def life(*args: Any, **kwargs: Any) -> Iterator[Life]:
    """A Life of which nothing is left behind."""
    it = Life(*args, **kwargs)
    try:
        yield it
    finally:
        left = it.workers() if it.process.poll() is None else []
        for pid in [it.pid, *left]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        it.process.wait()


def torchrun(words: list[str], *flags: str, ranks: int = 2) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *FLAGS]
    return [*launch, *flags, "-m", "trainer.main", *words]


def processes() -> dict[int, tuple[int, str]]:
    """Living processes: parent and state by pid."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent), state
    return found


def hears(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1, which is so from the trainer's first moments on.

    A fork of torchrun that does not run the trainer yet has its handlers and command line: a signal to it is lost.
    """
    with suppress(OSError):
        if _command(pid) == _command(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])):
            return False
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def count(metrics: Path, kind: str = "train") -> int:
    return sum(x["kind"] == kind or x.get("event") == kind for x in read_lines(metrics))
