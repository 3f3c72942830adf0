"""Reports of runs from their metrics.jsonl: a plot of the loss, and a table of all runs. Imports no torch."""

from pathlib import Path
from typing import Any

from trainer.metrics import read_lines


def plot_loss(run: Path) -> Path:
    """Plot training and validation loss and the corpus's true floor. Returns the file, `loss.png` in the run folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_lines(run / "metrics.jsonl")
    train_lines = [line for line in lines if line["kind"] == "train"]
    tokens_at_step = {line["step"]: line["tokens"] for line in train_lines}
    eval_lines = [line for line in lines if line["kind"] == "eval" and line["step"] in tokens_at_step]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    tokens = [line["tokens"] for line in train_lines]
    axes.plot(tokens, [line["loss"] for line in train_lines], lw=0.8, alpha=0.7, label="training")
    eval_tokens = [tokens_at_step[line["step"]] for line in eval_lines]
    axes.plot(eval_tokens, [line["loss"] for line in eval_lines], "o-", ms=3, label="validation")
    floors = [line["floor"] for line in eval_lines if line["floor"] is not None]
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
    """A run's progress and its last losses; None if the folder is no run."""
    if not (run / "config.yaml").is_file():
        return None
    lines = read_lines(run / "metrics.jsonl")
    train_lines = [line for line in lines if line.get("kind") == "train"]
    eval_lines = [line for line in lines if line.get("kind") == "eval"]
    start_lines = [line for line in lines if line.get("event") == "start"]
    return {
        "name": run.name,
        "step": train_lines[-1]["step"] if train_lines else 0,
        "steps": start_lines[-1]["steps"] if start_lines else None,
        "loss": train_lines[-1]["loss"] if train_lines else None,
        "validation": eval_lines[-1]["loss"] if eval_lines else None,
        "finished": bool(lines) and lines[-1].get("event") == "finished",
    }


def list_runs(folder: Path) -> str:
    """A table of the runs in a folder."""
    rows = [("run", "step", "loss", "validation", "state")]
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        run = describe_run(path)
        if run is None:
            continue
        progress = f"{run['step']}/{run['steps'] or '?'}"
        loss, validation = ("-" if run[key] is None else f"{run[key]:.4f}" for key in ("loss", "validation"))
        rows.append((run["name"], progress, loss, validation, "finished" if run["finished"] else "not finished"))
    if len(rows) == 1:
        return f"no runs in {folder}/ yet; start one with --config launch/tiny.yaml"
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded_rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in padded_rows)
