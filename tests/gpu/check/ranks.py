"""Measures launch/scout.yaml on several GPUs with several layouts, to choose the degree of expert parallelism.

All layouts use the same weights, rows and random numbers, so their losses must be equal up to rounding.
"""

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

from tests.gpu.check import project
from tests.gpu.check.compare import relative_change
from tests.gpu.check.report import Limit, at_most, exactly
from tests.gpu.check.runner import Check

# The first step computes the same products with the same bf16 weights; only the order of sums over ranks differs. Later
# steps start from weights that differ by that rounding, and near ties of the router then have other results.
LIMITS: dict[str, Limit] = {
    "code": exactly(0),
    "first": at_most(1e-4),
    "last": at_most(2e-3),
    "norm": at_most(0.02),
}
LAYOUT_S = 60
TINY_SETTINGS = ["train.micro_batch_size=2", "data.seq_len=64"]  # for --device cpu


def run(check: Check) -> None:
    ranks = check.options.ranks
    if ranks < 2:
        check.report.skip("", "needs several GPUs, for example make gpu N=8")
        return
    first: dict[str, Any] = {}
    for expert in expert_degrees(check):
        check.case(f"expert={expert}", partial(_check, check, expert, first), seconds=LAYOUT_S / 2)


def expert_degrees(check: Check) -> list[int]:
    """1, the degree that `auto` chooses, and the number of ranks, without duplicates."""
    config = project.read_config(*_config(check))
    n = check.options.ranks
    chosen = (project.expert_degree(config, n, expert) for expert in (1, "auto", n))
    return list(dict.fromkeys(chosen))


def _config(check: Check) -> tuple[str, list[str]]:
    return (project.SCOUT, []) if check.on_gpu else (project.TINY, TINY_SETTINGS)


def _check(check: Check, expert: int, first: dict[str, Any]) -> None:
    """Measure a layout, and compare it with the first one. `first` is filled by the first call."""
    figures = _launch(check, expert)
    losses, norm = figures.pop("losses"), figures.pop("norm")
    name = f"expert={expert}"
    if not first:
        first |= {"losses": losses, "norm": norm}
    differences = {
        "first": relative_change(losses[0], first["losses"][0]),
        "last": relative_change(losses[-1], first["losses"][-1]),
        "norm": relative_change(norm, first["norm"]),
    }
    check.report.check(name, LIMITS, **figures, loss=losses[0], **differences)


def _launch(check: Check, expert: int) -> dict[str, Any]:
    """Run the layout on all ranks. Returns rank 0's figures. Raises RuntimeError if there are none."""
    config, settings = _config(check)
    out = check.options.out / f"ranks-expert-{expert}.json"
    out.unlink(missing_ok=True)
    settings = [*settings, f"parallel.expert={expert}", f"run.device={check.options.device}"]
    log = check.options.out / f"ranks-expert-{expert}.log"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={check.options.ranks}",
                "-m",
                "tests.gpu.check.ranks_worker",
                str(out),
                config,
                *settings,
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, min(3 * LAYOUT_S, check.seconds_left())),
            cwd=project.ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    if not out.exists():
        raise RuntimeError(f"the ranks ended with exit code {done.returncode} and no figures; see {log}")
    return {"code": done.returncode, **json.loads(out.read_text())}
