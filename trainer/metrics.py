"""What a run tells: metrics.jsonl (the truth), the terminal, and wandb. Rank 0 alone has one that speaks."""

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
    """metrics.jsonl: one object a line, each line one flushed write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Drop a torn last line, and all lines beyond `step`, as a resume from there wants it."""
        if not self.path.exists():
            return
        kept = [line for line in read_lines(self.path) if line.get("step", 0) <= step]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(aside, self.path)

    def write(self, line: dict[str, Any]) -> None:
        """Append one object, as a whole or not at all. Raises OSError when there is no room."""
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
    """The whole lines of a metrics file; a torn one is passed over."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


class Reporter:
    """File, terminal and wandb behind one object; a quiet one (rank > 0) does nothing."""

    def __init__(self, folder: Path, config: LogConfig, name: str, speaks: bool) -> None:
        self.config, self.name, self.folder, self.speaks = config, name, folder, speaks
        self.file = MetricsFile(folder / "metrics.jsonl")
        self._bar: tqdm | None = None
        self._wandb: Any = None
        self._steps = 0
        self._full = False

    def log(self, text: str) -> None:
        """A line on stdout, above the bar."""
        if self.speaks:
            self._shown(lambda: tqdm.write(text) if self._bar is not None else print(text, flush=True))

    def _shown(self, show: Callable[[], object]) -> None:
        """On the terminal, if it is still there: a closed one must not end a run."""
        try:
            show()
        except OSError:
            self._bar = None

    def _kept(self, path: Path, keep: Callable[[], object]) -> None:
        """On the disk, if there is room: a full one must not end a run. Said once, until there is room again."""
        try:
            keep()
            self._full = False
        except OSError as error:
            if not self._full:
                self.log(f"{path}: cannot be written ({error.strerror}); going on without")
            self._full = True

    def write_text(self, path: Path, text: str) -> None:
        """A file of the run, such as its samples."""

        def keep() -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")

        if self.speaks:
            self._kept(path, keep)

    def start(self, step: int, steps: int, settings: dict[str, Any]) -> None:
        """The bar (on a terminal only), and wandb."""
        self._steps = steps
        if not self.speaks:
            return
        self._start_wandb(settings)
        self.event(step, "start", steps=steps)
        if sys.stderr.isatty():
            plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
            self._bar = tqdm(
                initial=step,
                total=steps,
                unit="step",
                dynamic_ncols=True,
                colour=None if plain else "green",
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
            )

    def _start_wandb(self, settings: dict[str, Any]) -> None:
        mode = self.config.wandb
        if mode == "disabled":
            return
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            self.log("log.wandb=online: no WANDB_API_KEY in the environment; logging offline (`wandb sync` sends it)")
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
        except Exception as error:  # a logger must not end a run
            self.log(f"log.wandb={mode}: {str(error).splitlines()[0]}; going on without it")
            self._wandb = None

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """A line in the file, the same to wandb."""
        if not self.speaks:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        self._kept(self.file.path, lambda: self.file.write({"kind": kind, "step": step, **finite}))  # JSON has no NaN
        if self._wandb is not None and (kind == "eval" or (kind == "train" and step % self.config.every == 0)):
            numbers = {f"{kind}/{k}": v for k, v in fields.items() if isinstance(v, int | float)}
            self._wandb.log({"step": step, **numbers})

    def event(self, step: int, event: str, **fields: Any) -> None:
        """Something that happened."""
        self.write("event", step, event=event, **fields)

    def train(self, step: int, fields: dict[str, Any]) -> None:
        """A finished step: the file always, the terminal by bar or every log.every steps."""
        self.write("train", step, **fields)
        if not self.speaks:
            return
        text = f"loss {fields['loss']:.3f}, {fields['tokens_per_second']:,.0f} tokens/s{_on_gpu(fields)}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._shown(lambda: self._bar and self._bar.update(step - self._bar.n))
        elif step % self.config.every == 0 or step == self._steps:
            left = (self._steps - step) * fields["step_seconds"]
            self.log(f"step {step}/{self._steps}: {text}, lr {fields['lr']:.2e}, {_clock(left)} left")

    def close(self) -> None:
        """End bar and wandb."""
        if self._bar is not None:
            self._shown(self._bar.close)
            self._bar = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _on_gpu(fields: dict[str, Any]) -> str:
    """How much of a GPU a step used, for the terminal; nothing on a CPU."""
    if "memory_reserved_gib" not in fields:
        return ""
    speed = f"{fields['mfu']:.0%} MFU" if "mfu" in fields else f"{fields['tflops']:.1f} TFLOP/s"
    return f", {speed}, {fields['memory_gib']:.1f} GiB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
