"""How a run ends that does not reach its last step: the exceptions, and the line for memory that ran out."""

from data.settings import UserError


class RunEnded(Exception):
    """This process ends a run without an error, and before it did the last step."""


class AlreadyFinished(RunEnded):
    """The run did its last step in an earlier start; the message says where, and how to continue."""


class Stopped(RunEnded):
    """All ranks know that the run was asked to end; `requeue`: by a cluster, which is to start it again."""

    def __init__(self, requeue: bool) -> None:
        super().__init__("stopped")
        self.requeue = requeue


class RankFailed(Exception):
    """Another rank ended this run, or keeps it waiting: one line that says which and why, and the exit code."""

    def __init__(self, line: str, code: int = 1) -> None:
        super().__init__(line)
        self.code = code


def memory_error(error: BaseException, phase: str, step: int, micro_batch_size: int, seq_len: int) -> UserError | None:
    """The line for an error that means that memory was not there, else None."""
    names, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    if not names & {"MemoryError", "OutOfMemoryError"} and "can't allocate memory" not in text:
        return None
    if step == 0:
        return UserError(
            f"out of memory while {phase}: `--dry-run` prints what the run needs; start more processes on more "
            "machines or devices, or use a smaller model"
        )
    return UserError(
        f"out of memory in step {step}, {phase}: lower train.micro_batch_size={micro_batch_size} or "
        f"data.seq_len={seq_len}, set train.recompute=full, or start more processes; `--dry-run` prints what they need"
    )
