"""Whole runs of the trainer on simulated GPUs: training, evaluation, a sample, a checkpoint, and resuming from it."""

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
    "train.compile=false",  # which the cases named so turn on: compiling for each of many ranks takes minutes here
)
COMPILED = "train.compile=auto"  # as it is on a GPU by default
SKIP_DRAWING = {"SIM_INIT": "0"}  # of initial weights, for large models
CUT = ("model.n_layers=2", "model.expert_dim=512")  # a checkpoint of 1 GB instead of 15
CUT_17B = ("model.n_layers=2", "model.expert_dim=1024", "model.nope_every=2", "data.seq_len=1024")
SELECTIVE = "train.recompute=selective"
ERROR = re.compile(r"^(\[rank\d+\]:\s*)?\w[\w.]*(Error|Exception): |^rank \d+ (failed|is gone|was ended)")


@dataclass(frozen=True)
class Case:
    """One run, and if `again` is given a second one that resumes from its checkpoint."""

    name: str
    machine: Machine
    words: tuple[str, ...] = ()
    config: str = "tiny"
    again: tuple[Machine, tuple[str, ...]] | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


def small(name: str, ranks: int, *words: str, card: str = "H100", again: int | None = None) -> Case:
    """A run of launch/tiny.yaml, resumed on `again` ranks."""
    resumed = (Machine(again, card), without_layout(words)) if again else None
    return Case(name, Machine(ranks, card), words, again=resumed)


def without_layout(words: tuple[str, ...]) -> tuple[str, ...]:
    """The settings of a run that resumes on another number of ranks."""
    return tuple(word for word in words if not word.startswith("parallel."))


def eight(name: str, *words: str, config: str = "scout", nodes: int = 1, again: int | None = None) -> Case:
    """A run of a large model on eight H100, of one micro-batch a rank; resumed on `again` ranks."""
    rows = ("train.global_batch_size=16", "train.micro_batch_size=2")
    resumed = (Machine(again), (*rows, *without_layout(words))) if again else None
    return Case(name, Machine(8, nodes=nodes), (*rows, *words), config, resumed, SKIP_DRAWING)


CASES = (
    small("1 GPU", 1, again=1),
    small("2 GPUs", 2, again=4),
    small("4 GPUs, expert 2", 4, "parallel.expert=2", again=2),
    small("4 GPUs, expert 4", 4, "parallel.expert=4", again=1),
    small("4 GPUs, replicate 2", 4, "parallel.replicate=2", again=2),
    small("float32", 2, "train.dtype=float32"),
    small("float16", 2, "train.dtype=float16"),
    small("A100", 2, card="A100"),
    small("L4", 2, card="L4"),
    small("T4", 2, card="T4", again=1),
    small("chunks and documents", 2, "model.attention_chunk=64"),
    small("documents and dropout", 2, "model.dropout=0.1", "model.attention_dropout=0.1"),
    small("recompute selective", 2, "train.recompute=selective"),
    small("recompute full", 2, "train.recompute=full"),
    small("recompute full, 1 GPU", 1, "train.recompute=full"),
    small("recompute full, expert 1", 2, "train.recompute=full", "parallel.expert=1"),
    small("compile", 2, COMPILED),
    small("compile, recompute full", 2, COMPILED, "train.recompute=full"),
    small("compile, T4", 1, COMPILED, card="T4"),
    small("liger", 2, "train.liger=true"),
    small("liger and compile, A100", 1, "train.liger=true", COMPILED, card="A100"),
    small("async_save", 2, "checkpoint.async_save=true", "checkpoint.every=1", again=1),
    small("top-2, noise, losses", 2, "model.top_k=2", "model.noisy_top_k=true", "model.aux_loss_weight=0.01"),
    small("tied, GQA, dense", 2, "model.tie_embeddings=true", "model.n_kv_heads=1", "model.moe_every=0"),
    small("deterministic, compile", 1, "run.deterministic=true", COMPILED),
    Case("skewed routing", Machine(4), ("parallel.expert=4",), extra={"SIM_SKEW": "1"}),
    Case("kaggle.yaml, 2 T4", Machine(2, "T4"), ("train.global_batch_size=32",), "kaggle", extra=SKIP_DRAWING),
    Case("scout.yaml, compile", Machine(), ("train.global_batch_size=16", COMPILED), "scout", extra=SKIP_DRAWING),
    eight("scout.yaml, 8 GPUs, expert 8", "parallel.expert=8"),
    eight("scout.yaml cut, 8 GPUs, expert 8", "parallel.expert=8", *CUT, again=4),
    eight("scout.yaml cut, 8 GPUs, expert 4", "parallel.expert=4", *CUT),
    eight("scout.yaml cut, 8 GPUs, expert 1", "parallel.expert=1", *CUT),
    eight("scout.yaml cut, 8 GPUs, replicate 2 x shard 4", "parallel.replicate=2", "parallel.expert=4", *CUT, again=4),
    eight("scout.yaml cut, 2 nodes of 4 GPUs", *CUT, nodes=2, again=4),
    eight("scout-17b-16e.yaml cut, 8 GPUs", *CUT_17B, config="scout-17b-16e", again=4),
    eight("scout-17b-16e.yaml cut, 8 GPUs, recompute selective", *CUT_17B, SELECTIVE, config="scout-17b-16e"),
)


@dataclass
class Result:
    name: str
    passed: bool
    seconds: float
    what: str  # of the first error, or what the run left

    def markdown(self) -> str:
        what = self.what.replace("|", "\\|")
        return f"| {self.name} | {'passed' if self.passed else 'FAILED'} | {self.seconds:.0f} s | {what} |"


HEAD = "| whole run (simulated) | result | time | what it left, or the first error |\n|---|---|---|---|"


def run(simulation: Simulation, pattern: str) -> Iterator[Result]:
    """The cases whose names have a match of the regular expression `pattern`, one after another."""
    for case in CASES:
        if re.search(pattern, case.name, re.IGNORECASE):
            yield run_case(simulation, case)


def run_case(simulation: Simulation, case: Case) -> Result:
    started, name = time.monotonic(), re.sub(r"\W+", "-", case.name)
    folder = simulation.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    where = ["--config", f"launch/{case.config}.yaml", f"run.dir={folder.parent}", f"run.name={name}"]
    wrong, left = "", ""
    starts = [(case.machine, case.words, STEPS)]
    if case.again:
        starts.append((*case.again, 2 * STEPS))
    for machine, words, steps in starts:
        settings = [*where, *simulation.corpus(), *COMMON, *words, f"train.steps={steps}"]
        done = simulation.train(machine, settings, case.extra)
        (simulation.folder / f"{name}-{steps}.log").write_text(done.stdout)
        wrong = problem(done.returncode, done.stdout, folder, steps)
        if wrong:
            wrong = f"{machine.ranks} GPUs, up to step {steps}: {wrong}"
            break
        left = ", ".join([*filter(None, [left]), f"step {steps} on {machine.ranks}"])
    result = Result(case.name, not wrong, time.monotonic() - started, wrong or left)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def problem(code: int, output: str, folder: Path, steps: int) -> str:
    """Why a run is not what it should be, "" if it is: exit code, evaluation, checkpoint, sample, a resumed start."""
    if code:
        return f"exit code {code}: {first_error(output)}"
    if steps > STEPS and f"resumed from step {STEPS}" not in output:
        return "did not resume"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    missing = [
        name
        for name, there in {
            "evaluation": any(line["kind"] == "eval" and line["step"] == steps for line in lines),
            "checkpoint": any((folder / "checkpoints").glob(f"*{steps}")),
            "sample": any((folder / "samples").glob(f"*{steps}.txt")),
        }.items()
        if not there
    ]
    return f"no {', no '.join(missing)}" if missing else ""


def first_error(output: str) -> str:
    """The first line of the output that looks like an error, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = (line for line in lines if ERROR.search(line))
    return next(found, lines[-1] if lines else "no output")[:240]
