"""torchrun with the flags that a run needs to be stopped and resumed. `make train` and launch/slurm/ use it.

    python -m launch.torchrun --nproc_per_node=2 -m trainer.main --config launch/tiny.yaml

Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are passed on to the workers, which save and end. On one machine, if a worker is
killed, all workers are restarted from the last checkpoint. torchrun's own messages and tracebacks are left out, because
the workers' messages say what happened. For several machines add torchrun's flags --nnodes and --rdzv_endpoint.
"""

import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence

from trainer.fault_tolerance.launcher import exit_now

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SHUTDOWN_TIMEOUT_S = 600  # from a signal until torchrun kills workers that still save
MAX_RESTARTS = 3  # on one machine


def default_flags(one_machine: bool) -> list[str]:
    """Flags of torchrun. They come before the user's, which therefore win."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as under nohup
    signals = [name for name in SIGNALS if name != "SIGHUP" or not ignores_hangup]
    flags = [f"--signals-to-handle={','.join(signals)}", f"--shutdown-timeout={SHUTDOWN_TIMEOUT_S}"]
    if one_machine:
        flags += ["--standalone", f"--max-restarts={MAX_RESTARTS}"]
    return flags


def process_count_error(nproc_per_node: str, parse: Callable[[str], int]) -> str | None:
    """Why torchrun cannot start that many processes, None if it can. parse: torchrun's own function."""
    if nproc_per_node == "gpu":
        from trainer.devices import cuda_devices

        count, problem = cuda_devices()
        if not count:
            return f"{problem or 'no CUDA device on this machine'}; to train on the CPU, give the number of processes"
    try:
        parse(nproc_per_node)
    except ValueError as error:
        return f"{error}; give the number of processes, or gpu for one process on each GPU"
    return None


def main(words: Sequence[str]) -> int:
    """Run torchrun until the workers end. Returns the exit code.

    0: done, or on one machine stopped by Ctrl-C; 1: a worker failed, or another signal stopped the run; 2: an
    impossible number of processes; 130: Ctrl-C before the workers started, or on one of several machines.
    """
    one_machine = not any(word.startswith("--rdzv") for word in words)
    log_level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("LOGLEVEL", "ERROR")  # omits torchrun's advice on OMP_NUM_THREADS
    os.environ["TORCH_CPP_LOG_LEVEL"] = log_level or "ERROR"  # omits warnings if one machine ends before another
    warnings.filterwarnings("ignore", "CUDA initialization")  # the workers log one line instead of torch's warning
    # A process that a shell starts in the background ignores SIGINT, unless it is set again.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if log_level is None:  # torch has read it, and the workers must not inherit it
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    logging.getLogger("torch.distributed").setLevel(os.environ["LOGLEVEL"])
    start = time.monotonic()
    args = run.parse_args([*default_flags(one_machine), *words])
    # The workers print this command to resume the run; each adds its own arguments (see trainer.loop.command).
    own_words = words[: len(words) - len(args.training_script_args)]
    os.environ.setdefault("LAUNCHED_BY", f"python -m launch.torchrun {shlex.join(own_words)}")
    error_line = process_count_error(args.nproc_per_node, run.determine_local_world_size)
    if error_line is not None:
        print(f"torchrun: --nproc_per_node={args.nproc_per_node}: {error_line}", file=sys.stderr)
        return 2
    try:
        run.run(args)
    except SignalException as stop:
        received_twice = isinstance(stop.__context__, SignalException)
        if stop.sigval != signal.SIGINT or received_twice:
            return 1
        return 0 if one_machine else 130
    except KeyboardInterrupt:  # before the workers started
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 1
    except RendezvousError as error:
        print(f"torchrun: {error} {error.__cause__ or ''}", file=sys.stderr)
        return 1
    if one_machine:
        print(f"train: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
