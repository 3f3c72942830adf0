"""The allocator's peak of a run of launch/scout.yaml with two layers, against what --dry-run announces."""

import json

from tests.gpu.check import project, runs
from tests.gpu.check.report import exactly
from tests.gpu.check.runner import Check

WORDS = [
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
    places = [f"data.dir={runs.corpus(check)}", f"run.dir={check.options.scratch / 'runs'}", "run.name=memory"]
    words = project.config_words(project.SCOUT, [*WORDS, *places])
    out = check.options.out
    timeout = max(1.0, min(120.0, check.seconds_left()))
    plan = project.command("trainer.main", *words, "--dry-run", log=out / "dry-run.log", timeout=timeout)
    done = project.command("tests.gpu.check.peak", *words, log=out / "memory.log", timeout=timeout)
    peak = json.loads(done.stdout.splitlines()[-1]) if done.code == 0 else {}
    planned = project.planned_gib(plan.stdout) or float("nan")
    figures = {
        "code": max(plan.code, done.code),
        "planned_gib": planned,
        **peak,
        "ratio": peak.get("peak_gib", float("nan")) / planned,
        "error": plan.tail + done.tail,
    }
    # A plan is there to be relied on: it may promise 20% too little at most, which is what fragments and the workspaces
    # of libraries take, and a third too much.
    check.report.check("2 layers of launch/scout.yaml", {"code": exactly(0), "ratio": (0.75, 1.2)}, **figures)
