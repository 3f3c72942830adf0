"""`make bench`: the table for the README, and bench.json beside it."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

from tests.bench import around, checkpoint, experts, generation, training
from tests.bench.harness import HEAD, Figure

PARTS = {
    "training": training.measure,
    "experts": experts.measure,
    "loss": around.loss_memory,
    "attention": around.attention,
    "loader": around.loader,
    "encoding": around.encoding,
    "start": around.start,
    "checkpoint": checkpoint.measure,
    "generation": generation.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.bench", description="Figures as ratios, measured in one run.")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds of each case")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="some of the figures")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{machine}, torch {torch.__version__}; {args.repeats} rounds in turns, medians\n\n{HEAD}", flush=True)
    figures: list[Figure] = []
    for part in args.part:
        figures += (new := PARTS[part](args.repeats))
        print("\n".join(f.row() for f in new), flush=True)
        result = {"machine": machine, "torch": torch.__version__, "figures": [f.json() for f in figures]}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
