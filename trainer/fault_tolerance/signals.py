"""Signals that stop a run, and the file that tells the cluster to start it again.

The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 on any rank asks all ranks to save and end; a second one ends the process
at once. A thread receives them, so that they are noticed while the main thread runs C++ code. After SIGTERM or SIGUSR1,
which a cluster sends, the file `requeue` in the run folder says that the run has more steps to do. Imports no torch, so
that signals are received from the start of the process.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType

from trainer.fault_tolerance.launcher import SIGNAL_RECEIVED, end_launcher
from trainer.terminal import log_stderr

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
REQUEUE = "requeue"
COPY_WINDOW_S = 2.0  # srun and torchrun both pass a signal on, so each worker receives it twice


class StopFlag:
    """Whether this rank was asked to stop, and whether by a cluster, which will start the run again.

    A signal within COPY_WINDOW_S of the first one counts as its copy. SIGUSR1 is a warning that comes ahead of SIGTERM:
    the SIGTERM counts as a first signal again, and does not interrupt the save that SIGUSR1 started. Used as a context,
    it restores the previous signal handlers at the end.
    """

    requested = False
    requeue = False
    # Set when this launch of the workers has done a step. If the time limit of a job ends before that, to requeue the
    # job would repeat the same launch without end.
    step_done = False

    def listen(self) -> "StopFlag":
        """Receive signals from now on. To be called on the main thread."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_handlers = {}
        self._first_at: dict[str, float] = {}  # time of the first "warning" (SIGUSR1), and of the first other signal
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            # nohup makes a process ignore SIGHUP, which is respected
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                self._old_handlers[number] = signal.signal(number, _do_nothing)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._receive, name="signals", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.send(b"\0")
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def __enter__(self) -> "StopFlag":
        return self.listen()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _receive(self) -> None:
        """The thread: Python writes the number of each signal to the socket, and `close` writes 0."""
        while True:
            for number in self._reader.recv(64):
                if number == 0:
                    return
                if number in self._old_handlers:
                    self._handle(signal.Signals(number), time.monotonic())

    def _handle(self, number: signal.Signals, now: float) -> None:
        first_at = self._first_at.setdefault("warning" if number.name == "SIGUSR1" else "stop", now)
        if not self.requested:
            self.requeue = number.name == "SIGTERM" or (number.name == "SIGUSR1" and self.step_done)
            self.requested = True
            SIGNAL_RECEIVED.set()
            if number == signal.SIGINT:
                log_stderr(
                    "Ctrl-C: saving a checkpoint after this step, then ending; "
                    f"press Ctrl-C again after {COPY_WINDOW_S:.0f} s to end without saving"
                )
            elif number.name == "SIGUSR1" and not self.step_done:
                log_stderr(
                    "SIGUSR1 before the first step was done: the job is not requeued, because it would get no further; "
                    "raise its time limit"
                )
        elif now - first_at > COPY_WINDOW_S:
            log_stderr(f"second signal ({number.name}): ending at once, without saving")
            end_launcher()
            os._exit(128 + number)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler must be set, or Python would not write the signal to the wakeup socket."""


def write_requeue_file(folder: Path, step: int) -> None:
    """Write `requeue` into a run folder: the cluster stopped the run at `step`, and it has more steps to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{REQUEUE}"
        temporary.write_text(f"stopped at step {step} by a signal; the same command resumes the run\n")
        os.replace(temporary, folder / REQUEUE)
    except OSError as error:
        log_stderr(f"{folder / REQUEUE}: cannot be written ({error}); the job will not be requeued, submit it again")


def remove_requeue_file(folder: Path) -> None:
    """Remove `requeue` from a run folder, as each launch of the workers does."""
    with contextlib.suppress(OSError):
        (folder / REQUEUE).unlink()
