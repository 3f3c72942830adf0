"""A worker and the torchrun that started it: ending with it, and keeping it from restarting workers in vain.

Imports no torch, so that a worker can use it before torch is imported.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from typing import NoReturn

SIGNAL_RECEIVED = threading.Event()  # set by `signals.StopFlag`


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
    SIGNAL_RECEIVED.wait(5)


def restarts_left() -> int:
    """How often torchrun will start its workers again when one fails."""
    most, done = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return most - done


def exit_now(code: int) -> NoReturn:
    """End this process, with what it said written out, and no more.

    Python would take itself apart first, for half a second of CPU with torch, and aborts (SIGABRT) when a thread comes
    back from a store or a collective meanwhile: a run that is done would count as failed.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
