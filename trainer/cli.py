"""What all commands share: how they end, and flags that several of them have. Imports no torch."""

import argparse
import signal
from collections.abc import Callable

from data.settings import UserError
from trainer import environment
from trainer.fault_tolerance.errors import RankFailed
from trainer.fault_tolerance.launcher import end_launcher
from trainer.terminal import log_stderr, rank


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; the user's mistakes end in one line and exit code 2, Ctrl-C in one line and 130.

    What another rank ended with is one line too. torchrun is kept from trying a mistake again. To be called before
    torch is imported, which reads the environment that is set here.
    """
    environment.set_defaults()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background it would be ignored
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


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag `--device`, the same for all commands that compute with a checkpoint."""
    about = "where to compute: a GPU (bf16 from sm80 on), or the CPU (fp32); auto: the GPU if there is one"
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help=f"{about} (default: auto)")
