"""torchrun, calmer: a line where it would print a traceback, and no warnings when nodes end one after another.

    python -m launch.torchrun --nproc_per_node=2 -m trainer.main --config launch/tiny.yaml

Each node of a job would print those at every stop. Exit codes: 128 + N when signal N ended it and its workers, 1 when a
worker failed or the nodes did not meet.
"""

import logging
import os
import signal
import sys


def run() -> int:
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"  # read while torch is imported; not for the workers
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.WARNING)
    try:
        main()
    except SignalException as error:
        print(f"torchrun: ended by {signal.Signals(error.sigval).name}, after its workers", file=sys.stderr)
        return 128 + error.sigval
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    except RendezvousError as error:
        print(f"torchrun: {error} {error.__cause__ or ''}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
