"""Facts from the operating system: which processes are alive, and how much this one has read and written."""

import contextlib
import os
from pathlib import Path


def process_alive(pid: int) -> bool:
    """Whether a process of this machine is alive. A zombie, which its parent has not waited for yet, is not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # there is no /proc, or the process belongs to another user
        return True


def sibling_exited() -> bool:
    """Whether torchrun has lost a worker of this machine. Its SIGTERM then means a restart, and not a stop."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parents = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.append(int(parent))
    return 0 < parents.count(os.getppid()) < workers


def transferred_mib() -> int:
    """MiB that this process has read and written so far, without sockets; 0 if the system does not count them."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return (int(counts["rchar"]) + int(counts["wchar"])) >> 20
    except (OSError, KeyError):
        return 0
