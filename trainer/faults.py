"""What ends a run from outside: signals, a launcher that dies, memory that is not there; and what it leaves behind.

A first SIGINT, SIGTERM, SIGHUP or SIGUSR1 on any rank asks all of them to save and end; a second one ends at once.
They are heard by a thread, so also while the main thread is deep in C++. After SIGTERM or SIGUSR1, which a cluster
sends, the file `requeue` in the run folder says that there is more to do. Imports no torch, to hear from the start.
"""

import contextlib
import ctypes
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import NoReturn

from data.settings import UserError

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
REQUEUE = "requeue"
ASKED = threading.Event()  # by a signal
REPEAT = 2.0  # seconds: srun and torchrun both pass a signal on, so each worker gets it twice


class Stopped(Exception):
    """All ranks know that the run was asked to end."""

    def __init__(self, requeue: bool) -> None:
        super().__init__("stopped")
        self.requeue = requeue


class RankFailed(Exception):
    """Another rank ended this run, or keeps it waiting: one line that says which and why, and the exit code."""

    def __init__(self, line: str, code: int = 1) -> None:
        super().__init__(line)
        self.code = code


class StopFlag:
    """Whether this rank was asked to end, and whether by a cluster, which will start the run again.

    What follows within REPEAT seconds is a copy of the first signal. SIGUSR1 is a warning ahead of SIGTERM: that is a
    first signal of its own, and does not break off the save that the warning began. A context: the handlers of before
    come back when it is left.
    """

    asked = False
    requeue = False
    stepped = False  # set once a step of this start is done: a job whose time is over before would go round forever

    def listen(self) -> "StopFlag":
        """Hear signals from now on. From the main thread only."""
        self._ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        self._mouth = mouth
        self._before = {}
        self._heard: dict[bool, float] = {}  # SIGUSR1 or another: when it first came
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # which is what nohup asks for
                self._before[number] = signal.signal(number, _pass)
        self._wakeup = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._mouth.send(b"\0")
        self._thread.join()
        self._ear.close()
        self._mouth.close()

    def __enter__(self) -> "StopFlag":
        return self.listen()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listen(self) -> None:
        while True:
            for number in self._ear.recv(64):
                if number == 0:
                    return
                if number in self._before:
                    self._hear(signal.Signals(number), time.monotonic())

    def _hear(self, number: signal.Signals, now: float) -> None:
        first = self._heard.setdefault(number.name == "SIGUSR1", now)
        if not self.asked:
            self.requeue = number.name == "SIGTERM" or (number.name == "SIGUSR1" and self.stepped)
            self.asked = True
            ASKED.set()
            if number == signal.SIGINT:
                tell("Ctrl-C: saving after this step; once more ends at once")
            elif number.name == "SIGUSR1" and not self.stepped:
                tell("SIGUSR1 before a step was done: not to be queued again; give it more time")
        elif now - first > REPEAT:
            tell(f"{number.name} again: ending at once, without saving")
            end_launcher()
            os._exit(128 + number)


def _pass(number: int, frame: FrameType | None) -> None:
    """A handler, so that Python writes the signal to the wakeup socket."""


def rank() -> int:
    """Of this process, before there is a process group."""
    return int(os.environ.get("RANK", 0))


def tell(line: str, by: int = 0) -> None:
    """A line on stderr, by one rank, from whatever thread; on a terminal it may stand below a bar."""
    if rank() == by and line:
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{line}\n".encode())


def die_with_parent() -> None:
    """Let this worker end when its torchrun does, even by SIGKILL, which would leave it alive."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    try:
        set_parent_death_signal = 1
        if sys.platform != "linux" or ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL) != 0:
            raise OSError
    except (OSError, AttributeError):
        watch_parent()


def watch_parent() -> None:
    """The same where the kernel does not do it: a thread that looks every second."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def end_launcher() -> None:
    """Keep torchrun from starting its workers again: what happened would happen again, or was not asked for.

    One rank asks it to end, by SIGHUP, since batch scripts take SIGTERM for the cluster's; the others wait for that,
    since the first to fail would be the reason to start again.
    """
    if restarts_left() <= 0:
        return
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.kill(os.getppid(), signal.SIGHUP)
    ASKED.wait(5)


def restarts_left() -> int:
    """How often torchrun will start its workers again when one fails."""
    most, done = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return most - done


def sibling_gone() -> bool:
    """Whether torchrun has lost a worker of this machine: then its SIGTERM means no stop, but a new start."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parents = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            parents += [int(parent)] if state != "Z" else []
    return 0 < parents.count(os.getppid()) < workers


def moved() -> int:
    """MiB that this process has read and written so far, sockets aside; 0 where it cannot be told."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return (int(counts["rchar"]) + int(counts["wchar"])) >> 20
    except (OSError, KeyError):
        return 0


def lives(pid: int) -> bool:
    """Whether a process of this machine lives; one that is only not yet waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no /proc here, or not ours to ask
        return True


def end(code: int) -> NoReturn:
    """End this process, with what it said written out, and no more.

    Python would take itself apart first, for half a second of CPU with torch, and aborts (SIGABRT) when a thread comes
    back from a store or a collective meanwhile: a run that is done would count as failed.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave_mark(folder: Path, step: int) -> None:
    """`requeue` in a run folder: it was stopped by its cluster and has more to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{REQUEUE}"
        aside.write_text(f"stopped at step {step} by a signal; starting it again goes on\n")
        os.replace(aside, folder / REQUEUE)
    except OSError as error:
        tell(f"{folder / REQUEUE}: cannot be written ({error}); the cluster will not start this run again by itself")


def clear_mark(folder: Path) -> None:
    """As every start does."""
    with contextlib.suppress(OSError):
        (folder / REQUEUE).unlink()


def memory_error(error: BaseException, phase: str, step: int, micro_batch_size: int, seq_len: int) -> UserError | None:
    """The line for an error that means that memory was not there, else None."""
    names, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    if not names & {"MemoryError", "OutOfMemoryError"} and "can't allocate memory" not in text:
        return None
    if step == 0:
        return UserError(
            f"out of memory while {phase}: `--dry-run` prints what the run needs; start more processes on more "
            "machines or devices, or take a smaller model"
        )
    return UserError(
        f"out of memory in step {step}, {phase}: lower train.micro_batch_size={micro_batch_size} or "
        f"data.seq_len={seq_len}, set train.recompute=full, or start more processes; `--dry-run` prints what they need"
    )


class Spikes:
    """Losses that jump: above the median of the last 100 by 10% and by eight times their median distance from it.

    Of a normal distribution that is 5.4 standard deviations. A jump is told once, until the loss has come back.
    """

    FEWEST = 20

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=100)
        self._high = False

    def usual(self, loss: float) -> float | None:
        """The usual loss, if this one begins a spike, else None. Takes it into account."""
        begins, median = False, 0.0
        if len(self._recent) >= self.FEWEST:
            median = statistics.median(self._recent)
            distance = statistics.median(abs(x - median) for x in self._recent)
            high = loss > max(median * 1.1, median + 8 * distance)
            begins, self._high = high and not self._high, high
        self._recent.append(loss)
        return median if begins else None
