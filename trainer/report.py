"""Pictures and lists of runs, out of their metrics.jsonl. Imports no torch."""

from pathlib import Path
from typing import Any

from trainer.metrics import read_lines


def plot_loss(run: Path) -> Path:
    """Draw training and validation loss, and the corpus's floor, to `loss.png` in the run folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_lines(run / "metrics.jsonl")
    train = [x for x in lines if x["kind"] == "train"]
    evals = [x for x in lines if x["kind"] == "eval"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot([x["tokens"] for x in train], [x["loss"] for x in train], lw=0.8, alpha=0.7, label="training")
    at = {x["step"]: x["tokens"] for x in train}
    shown = [x for x in evals if x["step"] in at]
    axes.plot([at[x["step"]] for x in shown], [x["loss"] for x in shown], "o-", ms=3, label="validation")
    floors = [x["floor"] for x in shown if x["floor"] is not None]
    if floors:
        axes.axhline(floors[-1], color="black", ls="--", lw=1, label=f"true floor {floors[-1]:.3f}")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(run / "loss.png")
    pyplot.close(figure)
    return run / "loss.png"


def describe_run(run: Path) -> dict[str, Any] | None:
    """Step, steps and last losses of a run folder; None if it is none."""
    lines = read_lines(run / "metrics.jsonl")
    if not (run / "config.yaml").is_file():
        return None
    train = [x for x in lines if x.get("kind") == "train"]
    evals = [x for x in lines if x.get("kind") == "eval"]
    starts = [x for x in lines if x.get("event") == "start"]
    return {
        "name": run.name,
        "step": train[-1]["step"] if train else 0,
        "steps": starts[-1]["steps"] if starts else None,
        "loss": train[-1]["loss"] if train else None,
        "validation": evals[-1]["loss"] if evals else None,
        "finished": any(x.get("event") == "finished" for x in lines[-1:]),
    }


def list_runs(folder: Path) -> str:
    """A table of the runs in a folder."""
    runs = [describe_run(p) for p in sorted(folder.iterdir())] if folder.is_dir() else []
    rows = [("run", "step", "loss", "validation", "state")]
    for run in runs:
        if run is not None:
            numbers = ["-" if run[k] is None else f"{run[k]:.4f}" for k in ("loss", "validation")]
            state = "finished" if run["finished"] else "not finished"
            rows.append((run["name"], f"{run['step']}/{run['steps'] or '?'}", *numbers, state))
    if len(rows) == 1:
        return f"no runs in {folder}/ yet; start one with --config launch/tiny.yaml"
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
