"""What the commands share: their parser, flags that several of them have, and the exit code. Imports no torch."""

import argparse
import signal
from collections.abc import Callable
from pathlib import Path

from data.settings import Parser as Parser  # reports a wrong flag as a UserError
from data.settings import UserError
from trainer import environment
from trainer.fault_tolerance.errors import RankFailed
from trainer.fault_tolerance.launcher import end_launcher
from trainer.terminal import log_stderr, rank


def guarded(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; an expected error is printed as one line, without a traceback.

    The exit code is 2 after a UserError, 130 after Ctrl-C, and that of the other rank if another rank failed.
    A UserError is a user error, or a failure that other settings may avoid, such as divergence or memory that ran out.
    After it torchrun does not restart the workers, which would fail again. Call this before torch is imported, because
    torch reads the environment variables that are set here.
    """
    environment.set_defaults()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in background jobs of a shell script
    try:
        return command()
    except UserError as error:
        log_stderr(str(error))
        code = 2
    except RankFailed as error:
        log_stderr(str(error), rank())
        code = error.code
    except KeyboardInterrupt:
        log_stderr("interrupted")
        return 130
    if code == 2:
        end_launcher()
    return code


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flag `--checkpoint` of all commands that read a checkpoint."""
    about = "a checkpoint folder, or a run folder, whose newest checkpoint is used"
    parser.add_argument("--checkpoint", type=Path, required=True, help=about)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag `--device` of all commands that compute with a checkpoint."""
    about = "cuda (bf16 from compute capability 8.0 on, else fp32) or cpu (fp32); auto: cuda if there is a GPU"
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help=f"{about} (default: auto)")
