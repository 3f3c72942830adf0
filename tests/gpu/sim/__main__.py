"""`make fake-gpu`: whole runs and counts on simulated GPUs. Prints tables for markdown; all figures are of the simulation.

    python -m tests.gpu.sim                                      every part
    python -m tests.gpu.sim --part runs -k scout                 whole runs whose names have `scout` in them
    python -m tests.gpu.sim --part counts --ranks 2 --config launch/scout.yaml train.compile=true
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.gpu.sim import build, counts
from tests.gpu.sim.machine import Machine, Simulation

PARTS = ("counts",)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.gpu.sim", description="Runs on simulated GPUs.")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("-k", default="", metavar="TEXT", help="only runs whose names contain it")
    parser.add_argument("--config", type=Path, help="counts of this config instead of the usual ones")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs for --config")
    parser.add_argument("--card", default="H100", help="the card for --config")
    parser.add_argument("--libraries", type=Path, default=Path(sys.prefix) / "simulated-gpu", help="built there")
    parser.add_argument("--folder", type=Path, help="of runs and corpora, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, default=Path("fake-gpu.json"))
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="for --config")
    args = parser.parse_intermixed_args()
    build.build(args.libraries)
    with tempfile.TemporaryDirectory(prefix="fake-gpu-") as temporary:
        simulation = Simulation(args.libraries, (args.folder or Path(temporary)).resolve())
        results: dict[str, object] = {}
        if "counts" in args.part:
            config = args.config or Path("launch/scout.yaml")
            title = " ".join([f"{config.name} on {args.ranks} {args.card}", *args.settings])
            words = ["--config", str(config), *args.settings]
            recording = counts.record(simulation, title, Machine(args.ranks, args.card), words)
            print(counts.table(recording), counts.by_function(recording), "", sep="\n", flush=True)
            results["counts"] = [recording.json()]
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
