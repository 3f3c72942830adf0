"""Compares the allocator's peak in a run of launch/scout.yaml with two layers with the estimate of --dry-run."""

import json

from tests.gpu.check import project, runs
from tests.gpu.check.report import exactly
from tests.gpu.check.runner import Check

SETTINGS = [
    *runs.CORPUS,
    "model.n_layers=2",
    "train.steps=3",
    "train.global_batch_size=32",
    "checkpoint.every=0",
    "checkpoint.async_save=false",
    "eval.every=0",
    "eval.final=none",
    "sample.max_new_tokens=1",
    "log.wandb=disabled",
]


def run(check: Check) -> None:
    runs.prepare_corpus(check)
    paths = [f"data.dir={runs.corpus(check)}", f"run.dir={check.options.scratch / 'runs'}", "run.name=memory"]
    arguments = project.config_arguments(project.SCOUT, [*SETTINGS, *paths])
    out = check.options.out
    timeout = max(1.0, min(120.0, check.seconds_left()))
    plan = project.command("trainer.main", *arguments, "--dry-run", log=out / "dry-run.log", timeout=timeout)
    done = project.command("tests.gpu.check.peak", *arguments, log=out / "memory.log", timeout=timeout)
    peak = json.loads(done.stdout.splitlines()[-1]) if done.code == 0 else {}
    planned = project.planned_gib(plan.stdout) or float("nan")
    figures = {
        "code": max(plan.code, done.code),
        "planned_gib": planned,
        **peak,
        "ratio": peak.get("peak_gib", float("nan")) / planned,
        "error": plan.tail + done.tail,
    }
    # The peak may exceed the estimate by 20%, for fragmented memory and the workspaces of libraries. The estimate may
    # exceed the peak by a third.
    check.report.check("2 layers of launch/scout.yaml", {"code": exactly(0), "ratio": (0.75, 1.2)}, **figures)
