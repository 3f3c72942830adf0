"""torchrun on one machine, as `make train` starts it: with the flags that let a run be stopped and started again.

    python -m launch.local --nproc_per_node=2 -m trainer.main --config launch/tiny.yaml

Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 reach the workers, which save and end; one that is killed is started again with the
others, from the last checkpoint. What torchrun has to say about it, a traceback of its own, is left out.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


def flags() -> list[str]:
    """torchrun's, before those of the user."""
    heard = [n for n in SIGNALS if n != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN]  # as under nohup
    return ["--standalone", f"--signals-to-handle={','.join(heard)}", "--shutdown-timeout=600", "--max-restarts=3"]


def main(words: Sequence[str]) -> int:
    """Runs until the workers end. 0: done, or stopped by Ctrl-C; 1: failed, or stopped by another signal."""
    os.environ.setdefault("LOGLEVEL", "ERROR")  # without its advice on OMP_NUM_THREADS
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background it would be ignored
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(os.environ["LOGLEVEL"])
    start = time.monotonic()
    try:
        run.run(run.parse_args([*flags(), *words]))
    except SignalException as stop:
        once = not isinstance(stop.__context__, SignalException)
        return 0 if stop.sigval == signal.SIGINT and once else 1
    except KeyboardInterrupt:  # before there were workers
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 1
    print(f"train: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
