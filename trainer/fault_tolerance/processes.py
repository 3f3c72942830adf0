"""What this machine says about processes: which are alive, and how much this one has read and written."""

import contextlib
import os
from pathlib import Path


def process_alive(pid: int) -> bool:
    """Whether a process of this machine lives; one that is only not yet waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no /proc here, or not ours to ask
        return True


def sibling_exited() -> bool:
    """Whether torchrun has lost a worker of this machine: then its SIGTERM means no stop, but a new start."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parents = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            parents += [int(parent)] if state != "Z" else []
    return 0 < parents.count(os.getppid()) < workers


def transferred_mib() -> int:
    """MiB that this process has read and written so far, sockets aside; 0 where it cannot be told."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return (int(counts["rchar"]) + int(counts["wchar"])) >> 20
    except (OSError, KeyError):
        return 0
