"""The reports of a run, by rank 0: metrics.jsonl, which has everything, log lines on the terminal, and wandb."""

import errno
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config import LogConfig


class MetricsFile:
    """metrics.jsonl: one JSON object per line. Each line is one unbuffered write, so that a crash tears at most one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Remove all lines beyond `step`, and torn ones, before a run resumes from that step."""
        if not self.path.exists():
            return
        kept = [line for line in read_lines(self.path) if line.get("step", 0) <= step]
        new_file = self.path.with_suffix(".tmp")
        new_file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(new_file, self.path)

    def write(self, line: dict[str, Any]) -> None:
        """Append one object, completely or not at all. Raises OSError if the disk is full."""
        text = json.dumps(line).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file; torn lines are skipped. Empty if there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


class Reporter:
    """metrics.jsonl, the terminal and wandb behind one object. If it is not enabled, as on ranks > 0, it does nothing.

    A full disk, a closed terminal or an error of wandb does not end the run.
    """

    def __init__(self, folder: Path, config: LogConfig, name: str, enabled: bool) -> None:
        self.folder = folder
        self.config = config
        self.name = name
        self.enabled = enabled
        self.file = MetricsFile(folder / "metrics.jsonl")
        self._bar: tqdm | None = None
        self._wandb: Any = None
        self._steps = 0
        self._disk_failed = False  # the last write failed

    def log(self, text: str) -> None:
        """Print a line on stdout, above the progress bar."""
        if self.enabled:
            self._show(lambda: tqdm.write(text) if self._bar is not None else print(text, flush=True))

    def _show(self, show: Callable[[], object]) -> None:
        """Call `show`, which writes to the terminal. A closed terminal is ignored."""
        try:
            show()
        except OSError:
            self._bar = None

    def _store(self, path: Path, store: Callable[[], object]) -> None:
        """Call `store`, which writes to `path`. An error is logged once, until a write succeeds again."""
        try:
            store()
            self._disk_failed = False
        except OSError as error:
            if not self._disk_failed:
                self.log(f"{path}: cannot be written ({error.strerror}); the run continues without it")
            self._disk_failed = True

    def write_text(self, path: Path, text: str) -> None:
        """Write a file of the run, such as its samples."""

        def store() -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")

        if self.enabled:
            self._store(path, store)

    def start(self, step: int, steps: int, settings: dict[str, Any]) -> None:
        """Start wandb, and on a terminal the progress bar, at `step` of `steps`."""
        self._steps = steps
        if not self.enabled:
            return
        self._start_wandb(settings)
        self.event(step, "start", steps=steps)
        if sys.stderr.isatty():
            uses_color = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
            self._bar = tqdm(
                initial=step,
                total=steps,
                unit="step",
                dynamic_ncols=True,
                colour="green" if uses_color else None,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
            )

    def _start_wandb(self, settings: dict[str, Any]) -> None:
        mode = self.config.wandb
        if mode == "disabled":
            return
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            self.log(
                "log.wandb=online: WANDB_API_KEY is not set, so wandb logs offline; `wandb sync` uploads the run later"
            )
            mode = "offline"
        try:
            import wandb

            quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True)
            self._wandb = wandb.init(
                project=self.config.project,
                name=self.name,
                dir=str(self.folder),
                mode=mode,
                config=settings,
                settings=quiet,
            )
            self._wandb.define_metric("*", step_metric="step")
        except Exception as error:  # whatever wandb raises, the run continues
            self.log(f"log.wandb={mode}: {str(error).splitlines()[0]}; the run continues without wandb")
            self._wandb = None

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Write a line to metrics.jsonl, and its numbers to wandb. JSON has no NaN: non-finite numbers become null."""
        if not self.enabled:
            return
        line: dict[str, Any] = {"kind": kind, "step": step}
        for key, value in fields.items():
            line[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        self._store(self.file.path, lambda: self.file.write(line))
        if self._wandb is not None and (kind == "eval" or (kind == "train" and step % self.config.every == 0)):
            numbers = {f"{kind}/{key}": value for key, value in fields.items() if isinstance(value, int | float)}
            self._wandb.log({"step": step, **numbers})

    def event(self, step: int, event: str, **fields: Any) -> None:
        """Write an `event` line; docs/metrics.md lists the events."""
        self.write("event", step, event=event, **fields)

    def train(self, step: int, fields: dict[str, Any]) -> None:
        """Write the `train` line of a finished step; show it in the bar, or as a log line every log.every steps."""
        self.write("train", step, **fields)
        if not self.enabled:
            return
        text = f"loss {fields['loss']:.3f}, {fields['tokens_per_second']:,.0f} tokens/s{_gpu_usage(fields)}"
        bar = self._bar
        if bar is not None:
            bar.set_postfix_str(text, refresh=False)
            self._show(lambda: bar.update(step - bar.n))
        elif step % self.config.every == 0 or step == self._steps:
            seconds_left = (self._steps - step) * fields["step_seconds"]
            self.log(f"step {step}/{self._steps}: {text}, lr {fields['lr']:.2e}, {_duration(seconds_left)} left")

    def close(self) -> None:
        """Close the bar and wandb."""
        if self._bar is not None:
            self._show(self._bar.close)
            self._bar = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _gpu_usage(fields: dict[str, Any]) -> str:
    """How a step used the GPU, for the terminal: speed and memory; empty on a CPU."""
    if "memory_reserved_gib" not in fields:
        return ""
    speed = f"{fields['mfu']:.0%} MFU" if "mfu" in fields else f"{fields['tflops']:.1f} TFLOP/s"
    return f", {speed}, {fields['memory_gib']:.1f} GiB"


def _duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
