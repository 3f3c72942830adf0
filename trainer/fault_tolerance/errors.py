"""Exceptions that end a run before its last step, and the error message for memory that ran out."""

from data.settings import UserError


class RunEnded(Exception):
    """This process ends the run before its last step, without an error."""


class AlreadyFinished(RunEnded):
    """An earlier launch of this run did its last step. The message names the folder, and says how to continue."""


class Stopped(RunEnded):
    """All ranks know that the run was asked to stop. requeue: a cluster asked, and is to start the run again."""

    def __init__(self, requeue: bool) -> None:
        super().__init__("stopped")
        self.requeue = requeue


class RankFailed(Exception):
    """Another rank ended this run or does not respond. line: which rank and why; code: this process's exit code."""

    def __init__(self, line: str, code: int = 1) -> None:
        super().__init__(line)
        self.code = code


def memory_error(error: BaseException, phase: str, step: int, micro_batch_size: int, seq_len: int) -> UserError | None:
    """A UserError that names the settings to lower, if `error` means that memory ran out; otherwise None.

    It is a UserError although it need not be a user error, because a restart with the same settings would not help.

    phase, step: where it happened; step 0 is before the first step.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"MemoryError", "OutOfMemoryError"} and "can't allocate memory" not in str(error):
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
