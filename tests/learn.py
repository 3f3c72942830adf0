"""`make learn`: three runs on stories whose entropy is known, compared in a table and a plot.

    python -m tests.learn [--steps 15000] [--out runs/learn] [section.key=value ...]

The three runs are the model of launch/tiny.yaml with its balance bias; the same model without the bias; and a dense
model, whose feed-forward is as wide as the experts that a token of the mixture uses, so that each token needs the same
matrix products. Corpus, data order, schedule and number of steps are the same. Each is an ordinary run under torchrun
on two processes, and resumes if this program is started again (its cost is then unknown). The excess is the loss on
held-out stories minus their true entropy; no model can have less than 0.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.settings import read
from trainer.config import SECTION_TYPES
from trainer.metrics import read_lines

CONFIG = "launch/tiny.yaml"
STORIES = 300_000  # 32 million tokens, so that no story occurs twice in a run


class Result(NamedTuple):
    """The results of one run."""

    name: str
    evals: list[tuple[float, float]]  # (seconds of training until then, excess in nats per token)
    tokens: int
    cpu_minutes: float  # NaN if the run was resumed
    minutes: float  # from its start to its end; NaN if the run was resumed
    busiest_expert: float | None  # its load relative to the mean load, averaged over the last tenth of the steps
    valid_sentences: str  # such as "50 of 56", or "-" if unknown


def common_settings(steps: int, out: Path, more: Sequence[str]) -> list[str]:
    """The settings of all three runs, as `section.key=value` words."""
    every = max(1, steps // 20)
    return [
        f"data.stories={STORIES}",
        "data.validation=0.01",
        f"data.dir={out}/corpus",
        f"train.steps={steps}",
        f"eval.every={every}",
        "eval.batches=25",
        f"checkpoint.every={5 * every}",
        "log.wandb=disabled",
        f"run.dir={out}",
        *more,
    ]


def variants(settings: Sequence[str]) -> dict[str, list[str]]:
    """The settings in which each run differs from the others, by the name of the run."""
    model: Any = read(SECTION_TYPES, CONFIG, settings)["model"]
    width = (model.top_k + model.shared_expert) * model.expert_dim
    return {
        "bias": [],
        "no bias": ["model.balance_rate=0"],
        "dense": ["model.moe_every=0", f"model.ffn_dim={width}"],
    }


def run(name: str, settings: Sequence[str], out: Path) -> Result:
    """Train one run, and read its results. Raises CalledProcessError."""
    folder = out / name.replace(" ", "-")
    command = [sys.executable, "-m", "launch.torchrun", "--nproc_per_node=2", "-m", "trainer.main", "--config", CONFIG]
    cpu_before, start = cpu_seconds(), time.monotonic()
    done = subprocess.run(
        [*command, *settings, f"run.name={folder.name}"], check=True, stdout=subprocess.PIPE, text=True
    )
    cost = {"cpu": cpu_seconds() - cpu_before, "wall": time.monotonic() - start, "output": done.stdout}
    cost_file = folder / "cost.json"
    if not cost_file.exists():  # a run that was already finished keeps the cost of its training
        cost_file.write_text(json.dumps(cost))
    cost = json.loads(cost_file.read_text())
    output = cost["output"] if "output" in cost else cost["said"]  # the name of the key in files of earlier versions
    if "resumed from step" in output:
        cost["cpu"] = cost["wall"] = math.nan

    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    seconds = {0: 0.0}  # of training up to each step
    for line in steps:
        seconds[line["step"]] = seconds[line["step"] - 1] + line["step_seconds"]
    last_tenth = steps[-len(steps) // 10 :]
    loads = [line["expert_load_max"] for line in last_tenth if line.get("expert_load_max")]
    valid = [line for line in output.splitlines() if "sentences in" in line]
    return Result(
        name=name,
        evals=[(seconds[line["step"]], line["excess"]) for line in lines if line["kind"] == "eval"],
        tokens=steps[-1]["tokens"],
        cpu_minutes=cost["cpu"] / 60,
        minutes=cost["wall"] / 60,
        busiest_expert=sum(loads) / len(loads) if loads else None,
        valid_sentences=valid[0].partition(" sentences")[0] if valid else "-",
    )


def cpu_seconds() -> float:
    """CPU time of all child processes that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    head = "| run | excess, nats a token | million tokens | CPU minutes | minutes | busiest expert | valid sentences |"
    rows = []
    for r in results:
        busiest = "-" if r.busiest_expert is None else f"{r.busiest_expert:.2f}"
        rows.append(
            f"| {r.name} | {r.evals[-1][1]:.4f} | {r.tokens / 1e6:.1f} | {r.cpu_minutes:.1f} | {r.minutes:.1f} | "
            f"{busiest} | {r.valid_sentences} |"
        )
    return "\n".join([head, "|---" * 7 + "|", *rows])


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot the excess over the time of training, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for r in results:
        axes.loglog([s / 60 for s, _ in r.evals], [excess for _, excess in r.evals], "o-", ms=3, label=r.name)
    axes.set(xlabel="minutes of training", ylabel="excess over the true floor (nats per token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.learn", description="Train a model with balance bias, without, and a dense one, and compare."
    )
    parser.add_argument("--steps", type=int, default=15000, help="steps of each run (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/learn"),
        help="folder of corpus, runs and learn.png (default: %(default)s)",
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of all three runs")
    args = parser.parse_intermixed_args(argv)
    from data.prepare import main as prepare

    settings = common_settings(args.steps, args.out, args.settings)
    if code := prepare(["--config", CONFIG, *settings]):
        return code
    results = []
    for name, more in variants(settings).items():
        results.append(run(name, [*settings, *more], args.out))
        print(table(results[-1:]), file=sys.stderr)
    plot(results, args.out / "learn.png")
    print(f"{table(results)}\n\nplot: {args.out / 'learn.png'}")
    return 0


if __name__ == "__main__":
    from trainer.cli import guarded

    sys.exit(guarded(main))
