"""`make bench`: measures the figures of the README's table, prints the table, and writes bench.json."""

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
    parser = argparse.ArgumentParser(
        "python -m tests.bench", description="Measures speed and memory as ratios, in one run."
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds of each case (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="file for the results (%(default)s)")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="only these figures")
    args = parser.parse_args()
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    else:
        torch.set_num_threads(os.cpu_count() or 1)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{machine}, torch {torch.__version__}; medians of {args.repeats} alternating rounds\n\n{HEAD}", flush=True)
    figures: list[Figure] = []
    for part in args.part:
        new_figures = PARTS[part](args.repeats)
        print("\n".join(figure.row() for figure in new_figures), flush=True)
        figures += new_figures
        result = {"machine": machine, "torch": torch.__version__, "figures": [figure.json() for figure in figures]}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
