"""Is learning real? Three runs on stories whose entropy is known, compared in a table and a picture.

    python -m tests.learn [--steps 15000] [--out runs/learn] [section.key=value ...]

The model of launch/tiny.yaml with its balance bias, the same without it, and a dense twin: one feed-forward as wide as
what a token sees of the mixture, so the same products for each token. Same corpus, order, schedule and number of steps;
what differs is the rest. Each is a run like any other, below torchrun on two processes, and goes on where it was when
this is started again (what it cost is then not known). The excess is the loss on held-out stories minus their true
entropy: no model can have less than 0.
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
STORIES = 300_000  # 32 million tokens: no run sees a story twice


class Result(NamedTuple):
    """What one run came to."""

    name: str
    evals: list[tuple[float, float]]  # seconds of training so far, excess in nats per token
    tokens: int
    cpu_minutes: float
    minutes: float  # from its start to its end
    busiest: float | None  # expert's load over the mean one, the mean of the last tenth of the steps
    sentences: str


def words_of(steps: int, out: Path, more: Sequence[str]) -> list[str]:
    """The settings of all three."""
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


def variants(words: Sequence[str]) -> dict[str, list[str]]:
    """By name the settings in which a run differs."""
    model: Any = read(SECTION_TYPES, CONFIG, words)["model"]
    width = (model.top_k + model.shared_expert) * model.expert_dim
    return {
        "bias": [],
        "no bias": ["model.balance_rate=0"],
        "dense": ["model.moe_every=0", f"model.ffn_dim={width}"],
    }


def run(name: str, words: Sequence[str], out: Path) -> Result:
    """Trains, and reads what came of it. Raises CalledProcessError."""
    folder, before, start = out / name.replace(" ", "-"), cpu_seconds(), time.monotonic()
    command = [sys.executable, "-m", "launch.torchrun", "--nproc_per_node=2", "-m", "trainer.main", "--config", CONFIG]
    done = subprocess.run([*command, *words, f"run.name={folder.name}"], check=True, stdout=subprocess.PIPE, text=True)
    cost = {"cpu": cpu_seconds() - before, "wall": time.monotonic() - start, "said": done.stdout}
    if not (kept := folder / "cost.json").exists():  # else it was done before, and the cost was that of looking
        kept.write_text(json.dumps(cost))
    cost = json.loads(kept.read_text())
    if "resumed from step" in cost["said"]:
        cost["cpu"] = cost["wall"] = math.nan
    lines = read_lines(folder / "metrics.jsonl")
    steps = [x for x in lines if x["kind"] == "train"]
    seconds = {0: 0.0}
    for x in steps:
        seconds[x["step"]] = seconds[x["step"] - 1] + x["step_seconds"]
    evals = [(seconds[x["step"]], x["excess"]) for x in lines if x["kind"] == "eval"]
    last = [x["expert_load_max"] for x in steps[-len(steps) // 10 :] if x.get("expert_load_max")]
    told = [line for line in cost["said"].splitlines() if "sentences in" in line]
    return Result(
        name,
        evals,
        steps[-1]["tokens"],
        cost["cpu"] / 60,
        cost["wall"] / 60,
        sum(last) / len(last) if last else None,
        told[0].partition(" sentences")[0] if told else "-",
    )


def cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(results: Sequence[Result]) -> str:
    rows = [
        f"| {r.name} | {r.evals[-1][1]:.4f} | {r.tokens / 1e6:.1f} | {r.cpu_minutes:.1f} | {r.minutes:.1f} | "
        f"{'-' if r.busiest is None else f'{r.busiest:.2f}'} | {r.sentences} |"
        for r in results
    ]
    head = "| run | excess, nats a token | million tokens | CPU minutes | minutes | busiest expert | sentences told |"
    return "\n".join([head, "|---" * 7 + "|", *rows])


def plot(results: Sequence[Result], path: Path) -> None:
    """Excess against time of training, both in logarithms."""
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
    parser = argparse.ArgumentParser("python -m tests.learn", description="Three runs, compared.")
    parser.add_argument("--steps", type=int, default=15000, help="of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/learn"), help="folder of corpus, runs, learn.png")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="for all three")
    args = parser.parse_intermixed_args(argv)
    from data.prepare import main as prepare

    words = words_of(args.steps, args.out, args.settings)
    if code := prepare(["--config", CONFIG, *words]):
        return code
    results = []
    for name, more in variants(words).items():
        results.append(run(name, [*words, *more], args.out))
        print(table(results[-1:]), file=sys.stderr)
    plot(results, args.out / "learn.png")
    print(f"{table(results)}\n\npicture: {args.out / 'learn.png'}")
    return 0


if __name__ == "__main__":
    from trainer.cli import guarded

    sys.exit(guarded(main))
