"""`make gpu`: checks a machine with a GPU, in nine minutes at most.

    python -m tests.gpu.check [--part NAME ...] [--list] [--budget SECONDS] [--out FOLDER] [--ranks N]

Exit code 0: every part is ok or was skipped. 1: a part failed. 2: there is no CUDA device, or an argument is wrong.
"""

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.gpu.check.parts import PARTS
from tests.gpu.check.report import Record, exit_code, markdown, plain_table, read_records
from tests.gpu.check.runner import Options, Part, run_parts


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.list:
        print("\n".join(f"{p.name:<16} about {p.seconds:3} s  {p.about}" for p in PARTS.values()))
        return 0
    if args.device == "cuda" and (why := why_no_cuda()):
        print(f"gpu: {why}", file=sys.stderr)
        return 2
    options = Options(args.out.resolve(), args.device, time.time(), args.budget, args.ranks)
    parts = chosen_parts(args.part, args.ranks)
    options.out.mkdir(parents=True, exist_ok=True)
    options.results.unlink(missing_ok=True)
    run_parts(parts, options)
    return finish(options, [part.name for part in parts])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.gpu.check", description="Check a machine with a GPU.")
    parser.add_argument("--part", nargs="+", choices=PARTS, metavar="NAME", help="run only these parts (see --list)")
    parser.add_argument("--list", action="store_true", help="print the parts and exit")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all parts (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder for the results (%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: check the check itself")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs for the part `ranks`; above 1, only this part runs")
    return parser


def chosen_parts(names: Sequence[str] | None, ranks: int) -> list[Part]:
    """The parts with these names, in the order of PARTS. Without names: those for one GPU, or those for several."""
    if not names and ranks > 1:
        names = ("machine", "ranks")
    elif not names:
        names = [name for name in PARTS if name != "ranks"]
    return [part for name, part in PARTS.items() if name in names]


def why_no_cuda() -> str | None:
    """Why torch sees no CUDA device, in one line; None if it sees one.

    Another process looks, because a process that has used CUDA must not fork.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.check.machine"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    output = result.stdout.strip() or result.stderr.strip() or "the search for a CUDA device failed without a message"
    return output.splitlines()[-1]


def finish(options: Options, parts: Sequence[str]) -> int:
    """Write and print the tables. Returns the exit code."""
    records = read_records(options.results)
    table = options.out / "gpu.md"
    table.write_text(markdown(records, title(records)), encoding="utf-8")
    seconds = time.time() - options.start
    print(f"\n{plain_table(records, parts)}\n")
    print(f"{seconds:.0f} s; results in {options.results}, tables for docs/benchmarks.md in {table}")
    return exit_code(records, parts)


def title(records: Sequence[Record]) -> str:
    """The heading of the tables: the device, the version of torch, and the date."""
    figures = next((r.figures for r in records if r.part == "machine"), {})
    device = figures.get("device", "CPU")
    day = datetime.date.today().isoformat()
    return f"### {device}, torch {torch.__version__}, {day} (`make gpu`)"
