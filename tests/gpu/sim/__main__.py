"""`make fake-gpu`: whole runs and counts on simulated GPUs. It prints Markdown tables, and writes JSON.

python -m tests.gpu.sim                                      every part: 75 minutes on two cores
python -m tests.gpu.sim --part runs -k scout                 the whole runs with `scout` in their names
python -m tests.gpu.sim --part memory                        the peaks of steps, and the estimates of --dry-run
python -m tests.gpu.sim --part counts --config launch/scout.yaml --ranks 2 train.compile=true
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.sim import build, counts, matrix, memory
from tests.gpu.sim.counts import Recording
from tests.gpu.sim.machine import Machine, Simulation

PARTS = ("counts", "experts", "memory", "runs")
DEFAULT_COUNTS = (  # GPUs, their model, and settings on top of launch/scout.yaml
    (Machine(), ("train.global_batch_size=32",)),
    (Machine(), ("train.global_batch_size=32", "train.compile=true")),
    (Machine(), ("train.global_batch_size=32", "train.liger=true")),
    (Machine(1, "A100"), ("train.global_batch_size=32",)),
    (Machine(2), ("train.global_batch_size=64",)),
)
EXPERT_DEGREES = (8, 4, 1)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.gpu.sim", description="Runs on simulated GPUs.")
    parser.add_argument(
        "--part",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="counts: a step by phase; experts: steps on 8 GPUs for several parallel.expert; memory: peaks of steps "
        "and their estimates; runs: whole runs",
    )
    parser.add_argument(
        "-k",
        default="",
        metavar="PATTERN",
        help="run only the whole runs and peaks whose names match this regular expression",
    )
    parser.add_argument("--config", type=Path, help="count only steps of this config")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs for --config")
    parser.add_argument(
        "--card", default="H100", help="model of the GPUs for --config: H100, A100, L4, T4, B200 or RTX5090"
    )
    parser.add_argument(
        "--libraries",
        type=Path,
        default=Path(sys.prefix) / "simulated-gpu",
        help="folder in which the libraries are built",
    )
    parser.add_argument(
        "--folder", type=Path, help="keep runs, logs and the corpus in this folder; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, default=Path("fake-gpu.json"), help="file for the results")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings for --config")
    args = parser.parse_intermixed_args()
    build.build(args.libraries)
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="fake-gpu-") as temporary:
        simulation = Simulation(args.libraries, (args.folder or Path(temporary)).resolve())
        if "counts" in args.part:
            cases: Sequence[tuple[Machine, tuple[str, ...]]] = DEFAULT_COUNTS
            if args.config or args.settings:
                cases = [(Machine(args.ranks, args.card), tuple(args.settings))]
            results["counts"] = [count(simulation, args.config, *case).json() for case in cases]
        if "experts" in args.part:
            results["experts"] = [recording.json() for recording in by_expert_degree(simulation)]
        failed = 0
        if "memory" in args.part:
            failed += compare_memory(simulation, args.k, results)
        if "runs" in args.part:
            print(matrix.HEAD, flush=True)
            runs = []
            for result in matrix.run(simulation, args.k):
                print(result.markdown(), flush=True)
                runs.append(vars(result))
                failed += not result.passed
            if not runs:
                parser.error(f"-k {args.k}: no whole run has a name that matches; see CASES in tests/gpu/sim/matrix.py")
            results["runs"] = runs
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


def count(simulation: Simulation, config: Path | None, machine: Machine, settings: Sequence[str]) -> Recording:
    """Record the counts of a step, and print them."""
    config = config or Path("launch/scout.yaml")
    title = " ".join([f"{config.name} on {machine.ranks} {machine.card}", *settings])
    recording = counts.record(simulation, title, machine, ["--config", str(config), *settings])
    print(counts.table(recording), counts.by_function(recording), "", sep="\n", flush=True)
    return recording


def compare_memory(simulation: Simulation, pattern: str, results: dict[str, object]) -> int:
    """Print peaks and estimates. Returns how many estimates are too far from the peak, or could not be compared."""
    print(memory.HEAD, flush=True)
    found: list[memory.Result | memory.Failure] = []
    for result in memory.run(simulation, pattern):
        print(result.markdown(), flush=True)
        found.append(result)
    results["memory"] = [vars(result) for result in found]
    print()
    return sum(not result.passed for result in found)


def by_expert_degree(simulation: Simulation) -> list[Recording]:
    """Record a step of the unchanged launch/scout.yaml on eight GPUs for each of EXPERT_DEGREES, and print them."""
    recordings = []
    for expert in EXPERT_DEGREES:
        arguments = ["--config", "launch/scout.yaml", f"parallel.expert={expert}"]
        title = f"scout.yaml on 8 H100, parallel.expert={expert}"
        recordings.append(counts.record(simulation, title, Machine(8), arguments))
    print(counts.comparison(recordings), *map(counts.table, recordings), "", sep="\n\n", flush=True)
    return recordings


if __name__ == "__main__":
    sys.exit(main())
