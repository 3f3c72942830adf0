"""Lines on stderr, printed by one rank, from any thread. Imports no torch."""

import contextlib
import os


def rank() -> int:
    """The rank of this process; usable before there is a process group."""
    return int(os.environ.get("RANK", 0))


def log_stderr(line: str, by: int = 0) -> None:
    """Print a line on stderr if this process is the rank `by`. A progress bar may be redrawn above it."""
    if rank() == by and line:
        with contextlib.suppress(OSError):  # stderr is closed
            os.write(2, f"{line}\n".encode())
