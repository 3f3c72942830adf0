"""A worker process and its launcher, torchrun: the worker ends with it, and keeps it from restarts that cannot help.

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
SIGNAL_TIMEOUT_S = 5.0  # until torchrun has passed on the SIGHUP of `end_launcher`


def die_with_parent() -> None:
    """Make this worker end when torchrun ends, even by SIGKILL, which would otherwise leave the worker running."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    try:
        set_parent_death_signal = 1
        if sys.platform != "linux" or ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL) != 0:
            raise OSError
    except (OSError, AttributeError):
        watch_parent()


def watch_parent() -> None:
    """Do the same if the kernel cannot: a thread checks every second whether the parent is still there."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def end_launcher() -> None:
    """Keep torchrun from restarting its workers, because a restart would fail again, or was not requested.

    One rank sends SIGHUP to torchrun. SIGTERM would not do, because batch scripts would think that the cluster sent it.
    The other ranks wait until torchrun passes the signal on: if one ended before, torchrun would restart the workers.
    """
    if restarts_left() <= 0:
        return
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.kill(os.getppid(), signal.SIGHUP)
    SIGNAL_RECEIVED.wait(SIGNAL_TIMEOUT_S)


def restarts_left() -> int:
    """How often torchrun would still restart its workers after a failure; 0 without torchrun."""
    allowed = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    done = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return allowed - done


def exit_now(code: int) -> NoReturn:
    """End this process with an exit code, without Python's finalization. Output is flushed.

    With torch, finalization costs half a second of CPU time. It also aborts (SIGABRT) if a thread returns from a store
    or a collective during it, and then a run that has finished would count as failed.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
