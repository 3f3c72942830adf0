"""torchrun with the flags that let a run be stopped and started again, as `make train` and launch/slurm/ start it.

    python -m launch.torchrun --nproc_per_node=2 -m trainer.main --config launch/tiny.yaml

Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 reach the workers, which save and end. On one machine a worker that is killed is
started again with the others, from the last checkpoint. What torchrun has to say about all that, with tracebacks of its
own, is left out. For several machines add --nnodes and --rdzv_endpoint, as torchrun wants them.
"""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence

from trainer.fault_tolerance.launcher import exit_now

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


def flags(alone: bool) -> list[str]:
    """torchrun's, before those of the user."""
    heard = [n for n in SIGNALS if n != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN]  # as under nohup
    common = [f"--signals-to-handle={','.join(heard)}", "--shutdown-timeout=600"]
    return [*common, "--standalone", "--max-restarts=3"] if alone else common


def wrong_number(nproc_per_node: str, number_of: Callable[[str], int]) -> str | None:
    """Why torchrun cannot start that many processes, by its own function; None if it can."""
    if nproc_per_node == "gpu":
        from trainer.devices import cuda_devices

        count, problem = cuda_devices()
        if not count:
            return f"{problem or 'no CUDA device on this machine'}; to train on the CPU give a number"
    try:
        number_of(nproc_per_node)
    except ValueError as error:
        return f"{error}; give a number, or gpu for one process for each GPU"
    return None


def main(words: Sequence[str]) -> int:
    """Runs until the workers end. 0: done; 1: failed, or stopped by a signal; 2: a number of processes that cannot be;
    130: by Ctrl-C, which alone is 0.
    """
    alone = not any(word.startswith("--rdzv") for word in words)
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("LOGLEVEL", "ERROR")  # without its advice on OMP_NUM_THREADS
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"  # nor on machines that end one after another
    warnings.filterwarnings("ignore", "CUDA initialization")  # torch's, which the workers replace by one line
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background it would be ignored
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if level is None:  # it was read, and is not for the workers
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    logging.getLogger("torch.distributed").setLevel(os.environ["LOGLEVEL"])
    start = time.monotonic()
    args = run.parse_args([*flags(alone), *words])
    if (mistake := wrong_number(args.nproc_per_node, run.determine_local_world_size)) is not None:
        print(f"torchrun: --nproc_per_node={args.nproc_per_node}: {mistake}", file=sys.stderr)
        return 2
    try:
        run.run(args)
    except SignalException as stop:
        once = not isinstance(stop.__context__, SignalException)
        return 1 if stop.sigval != signal.SIGINT or not once else 0 if alone else 130
    except KeyboardInterrupt:  # before there were workers
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 1
    except RendezvousError as error:
        print(f"torchrun: {error} {error.__cause__ or ''}", file=sys.stderr)
        return 1
    if alone:
        print(f"train: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
