"""Lines on stderr by one rank, from any thread. Imports no torch."""

import contextlib
import os


def rank() -> int:
    """Of this process, before there is a process group."""
    return int(os.environ.get("RANK", 0))


def log_stderr(line: str, by: int = 0) -> None:
    """A line on stderr, by one rank, from whatever thread; on a terminal it may stand below a bar."""
    if rank() == by and line:
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{line}\n".encode())
