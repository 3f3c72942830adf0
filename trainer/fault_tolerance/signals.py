"""Signals that end a run, and what it leaves behind for the cluster that started it.

A first SIGINT, SIGTERM, SIGHUP or SIGUSR1 on any rank asks all of them to save and end; a second one ends at once.
They are heard by a thread, so also while the main thread is deep in C++. After SIGTERM or SIGUSR1, which a cluster
sends, the file `requeue` in the run folder says that there is more to do. Imports no torch, to hear from the start.
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
REPEAT = 2.0  # seconds: srun and torchrun both pass a signal on, so each worker gets it twice


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
            SIGNAL_RECEIVED.set()
            if number == signal.SIGINT:
                log_stderr(
                    "Ctrl-C: saving a checkpoint after this step, then ending; "
                    "press Ctrl-C again after 2 s to end without saving"
                )
            elif number.name == "SIGUSR1" and not self.stepped:
                log_stderr(
                    "SIGUSR1 before the first step was done: the job is not requeued, because it would get no further; "
                    "raise its time limit"
                )
        elif now - first > REPEAT:
            log_stderr(f"second signal ({number.name}): ending at once, without saving")
            end_launcher()
            os._exit(128 + number)


def _pass(number: int, frame: FrameType | None) -> None:
    """A handler, so that Python writes the signal to the wakeup socket."""


def leave_mark(folder: Path, step: int) -> None:
    """`requeue` in a run folder: it was stopped by its cluster and has more to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{REQUEUE}"
        aside.write_text(f"stopped at step {step} by a signal; the same command resumes the run\n")
        os.replace(aside, folder / REQUEUE)
    except OSError as error:
        log_stderr(f"{folder / REQUEUE}: cannot be written ({error}); the job will not be requeued, submit it again")


def clear_mark(folder: Path) -> None:
    """As every start does."""
    with contextlib.suppress(OSError):
        (folder / REQUEUE).unlink()
