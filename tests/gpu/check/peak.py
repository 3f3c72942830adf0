"""Runs trainer.main, then prints the allocator's peak as one JSON object, the last line of stdout."""

import json
import sys

import torch

from tests.gpu.check.project import train

if __name__ == "__main__":
    code = train(sys.argv[1:])
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(json.dumps({"peak_gib": peak / 2**30, "reserved_gib": reserved / 2**30}), flush=True)
    sys.exit(code)
