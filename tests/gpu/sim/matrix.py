"""Whole runs of the trainer on simulated GPUs: train, evaluate, sample, save a checkpoint, and resume from it."""

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu.sim.machine import Machine, Simulation

STEPS = 2
COMMON = (
    "eval.batches=1",
    "eval.final=1",
    "log.every=1",
    "log.wandb=disabled",
    "sample.max_new_tokens=3",
    "sample.prompts=[Tom]",
    "train.warmup_steps=1",
    "run.timeout=300",
    "train.compile=false",  # only some cases compile: compiling for each of many ranks needs minutes here
)
COMPILED = "train.compile=auto"  # the default, which compiles on a GPU
SKIP_INITIAL_WEIGHTS = {"SIM_INIT": "0"}  # a CPU needs minutes to draw those of a large model
CUT = ("model.n_layers=2", "model.expert_dim=512")  # a checkpoint of 1 GB instead of 15
CUT_17B = ("model.n_layers=2", "model.expert_dim=1024", "model.nope_every=2", "data.seq_len=1024")
SELECTIVE = "train.recompute=selective"
ERROR = re.compile(r"^(\[rank\d+\]:\s*)?\w[\w.]*(Error|Exception): |^rank \d+ (failed|is gone|was ended)")


@dataclass(frozen=True)
class Case:
    """One run, and if `resume` is given a second start that resumes from its checkpoint."""

    name: str
    machine: Machine
    settings: tuple[str, ...] = ()
    config: str = "tiny"
    resume: tuple[Machine, tuple[str, ...]] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def tiny(name: str, ranks: int, *settings: str, card: str = "H100", resume_on: int | None = None) -> Case:
    """A run of launch/tiny.yaml, resumed on `resume_on` ranks."""
    resume = (Machine(resume_on, card), without_layout(settings)) if resume_on else None
    return Case(name, Machine(ranks, card), settings, resume=resume)


def without_layout(settings: tuple[str, ...]) -> tuple[str, ...]:
    """The settings for resuming on another number of ranks."""
    return tuple(setting for setting in settings if not setting.startswith("parallel."))


def on_8_gpus(name: str, *settings: str, config: str = "scout", nodes: int = 1, resume_on: int | None = None) -> Case:
    """A run of a large model on eight H100 with one micro-batch for each rank, resumed on `resume_on` ranks."""
    batch = ("train.global_batch_size=16", "train.micro_batch_size=2")
    resume = (Machine(resume_on), (*batch, *without_layout(settings))) if resume_on else None
    return Case(name, Machine(8, nodes=nodes), (*batch, *settings), config, resume, SKIP_INITIAL_WEIGHTS)


CASES = (
    tiny("1 GPU", 1, resume_on=1),
    tiny("2 GPUs", 2, resume_on=4),
    tiny("4 GPUs, expert 2", 4, "parallel.expert=2", resume_on=2),
    tiny("4 GPUs, expert 4", 4, "parallel.expert=4", resume_on=1),
    tiny("4 GPUs, replicate 2", 4, "parallel.replicate=2", resume_on=2),
    tiny("float32", 2, "train.dtype=float32"),
    tiny("float16", 2, "train.dtype=float16"),
    tiny("A100", 2, card="A100"),
    tiny("L4", 2, card="L4"),
    tiny("T4", 2, card="T4", resume_on=1),
    tiny("chunks and documents", 2, "model.attention_chunk=64"),
    tiny("documents and dropout", 2, "model.dropout=0.1", "model.attention_dropout=0.1"),
    tiny("recompute selective", 2, "train.recompute=selective"),
    tiny("recompute full", 2, "train.recompute=full"),
    tiny("recompute full, 1 GPU", 1, "train.recompute=full"),
    tiny("recompute full, expert 1", 2, "train.recompute=full", "parallel.expert=1"),
    tiny("compile", 2, COMPILED),
    tiny("compile, recompute full", 2, COMPILED, "train.recompute=full"),
    tiny("compile, T4", 1, COMPILED, card="T4"),
    tiny("liger", 2, "train.liger=true"),
    tiny("liger and compile, A100", 1, "train.liger=true", COMPILED, card="A100"),
    tiny("async_save", 2, "checkpoint.async_save=true", "checkpoint.every=1", resume_on=1),
    tiny("top-2, noise, losses", 2, "model.top_k=2", "model.noisy_top_k=true", "model.aux_loss_weight=0.01"),
    tiny("tied, GQA, dense", 2, "model.tie_embeddings=true", "model.n_kv_heads=1", "model.moe_every=0"),
    tiny("deterministic, compile", 1, "run.deterministic=true", COMPILED),
    Case("skewed routing", Machine(4), ("parallel.expert=4",), environment={"SIM_SKEW": "1"}),
    Case(
        "kaggle.yaml, 2 T4",
        Machine(2, "T4"),
        ("train.global_batch_size=32",),
        "kaggle",
        environment=SKIP_INITIAL_WEIGHTS,
    ),
    Case(
        "scout.yaml, compile",
        Machine(),
        ("train.global_batch_size=16", COMPILED),
        "scout",
        environment=SKIP_INITIAL_WEIGHTS,
    ),
    on_8_gpus("scout.yaml, 8 GPUs, expert 8", "parallel.expert=8"),
    on_8_gpus("scout.yaml cut, 8 GPUs, expert 8", "parallel.expert=8", *CUT, resume_on=4),
    on_8_gpus("scout.yaml cut, 8 GPUs, expert 4", "parallel.expert=4", *CUT),
    on_8_gpus("scout.yaml cut, 8 GPUs, expert 1", "parallel.expert=1", *CUT),
    on_8_gpus(
        "scout.yaml cut, 8 GPUs, replicate 2 x shard 4", "parallel.replicate=2", "parallel.expert=4", *CUT, resume_on=4
    ),
    on_8_gpus("scout.yaml cut, 2 nodes of 4 GPUs", *CUT, nodes=2, resume_on=4),
    on_8_gpus("scout-17b-16e.yaml cut, 8 GPUs", *CUT_17B, config="scout-17b-16e", resume_on=4),
    on_8_gpus("scout-17b-16e.yaml cut, 8 GPUs, recompute selective", *CUT_17B, SELECTIVE, config="scout-17b-16e"),
)


@dataclass
class Result:
    name: str
    passed: bool
    seconds: float
    what: str  # the first error, or the checkpoints of the run

    def markdown(self) -> str:
        what = self.what.replace("|", "\\|")
        return f"| {self.name} | {'passed' if self.passed else 'FAILED'} | {self.seconds:.0f} s | {what} |"


HEAD = "| whole run (simulated) | result | time | its checkpoints, or the first error |\n|---|---|---|---|"


def run(simulation: Simulation, pattern: str) -> Iterator[Result]:
    """Run the cases whose names match the regular expression `pattern`, one after another."""
    for case in CASES:
        if re.search(pattern, case.name, re.IGNORECASE):
            yield run_case(simulation, case)


def run_case(simulation: Simulation, case: Case) -> Result:
    started = time.monotonic()
    name = re.sub(r"\W+", "-", case.name)
    folder = simulation.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    base = ["--config", f"launch/{case.config}.yaml", f"run.dir={folder.parent}", f"run.name={name}"]
    error = ""
    checkpoints: list[str] = []
    starts = [(case.machine, case.settings, STEPS)]
    if case.resume:
        starts.append((*case.resume, 2 * STEPS))
    for machine, settings, steps in starts:
        arguments = [*base, *simulation.corpus(), *COMMON, *settings, f"train.steps={steps}"]
        done = simulation.train(machine, arguments, case.environment)
        (simulation.folder / f"{name}-{steps}.log").write_text(done.stdout)
        error = problem(done.returncode, done.stdout, folder, steps)
        if error:
            error = f"{machine.ranks} GPUs, up to step {steps}: {error}"
            break
        checkpoints.append(f"step {steps} on {machine.ranks}")
    seconds = time.monotonic() - started
    shutil.rmtree(folder, ignore_errors=True)
    return Result(case.name, not error, seconds, error or ", ".join(checkpoints))


def problem(code: int, output: str, folder: Path, steps: int) -> str:
    """What is wrong with a run: its exit code, evaluation, checkpoint, sample or resumption. "" if all is right."""
    if code:
        return f"exit code {code}: {first_error(output)}"
    if steps > STEPS and f"resumed from step {STEPS}" not in output:
        return "did not resume"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    exists = {
        "evaluation": any(line["kind"] == "eval" and line["step"] == steps for line in lines),
        "checkpoint": any((folder / "checkpoints").glob(f"*{steps}")),
        "sample": any((folder / "samples").glob(f"*{steps}.txt")),
    }
    missing = [name for name, found in exists.items() if not found]
    return f"no {', no '.join(missing)}" if missing else ""


def first_error(output: str) -> str:
    """The first line of the output that looks like an error; the last line if there is none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = (line for line in lines if ERROR.search(line))
    return next(found, lines[-1] if lines else "no output")[:240]
