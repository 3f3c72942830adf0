"""Lines on stderr, printed by one rank, from any thread, and words in them. Imports no torch."""

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


def plural(count: int, noun: str) -> str:
    """`1 process`, `2 processes`, `2 CUDA devices`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
