"""A run that is killed again and again, and ends as if nothing had happened.

    python -m tests.chaos --kills 100 [--seed 0] [section.key=value ...]

Two ranks train a tiny model below torchrun. One rank, both, or torchrun itself are ended by SIGKILL: before the first
step, in a step, in the middle of a save, in an evaluation, at moments that a seed decides. torchrun starts ranks again;
torchrun is started again here. In the end every loss, every evaluation and every tensor of the last checkpoint must be
bitwise what they are in a run that nobody touched. Prints what was killed where, as a table in Markdown.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tests.support.launched_runs import PATIENCE, Life, life, processes, torchrun

SAVE, EVALUATE = 3, 5  # steps between checkpoints, and between evaluations
STEPS = 2 * SAVE  # of the run, for each kill: more than a life gets done that is killed
WHAT, WHERE = ("one rank", "both ranks", "torchrun"), ("start", "step", "save", "evaluation")


def settings(folder: Path, name: str, kills: int, more: Sequence[str]) -> list[str]:
    words = ["data.stories=300", "data.vocab_size=320", "data.seq_len=32", "data.validation=0.1"]
    words += ["model.dim=16", "model.n_layers=2", "model.n_heads=2", "model.expert_dim=16", "model.n_experts=5"]
    words += ["model.nope_every=2", "model.max_seq_len=512", "model.dropout=0.1", "train.dtype=float32"]
    words += [f"train.steps={STEPS * kills + 20}", "train.global_batch_size=6", "train.micro_batch_size=2"]
    words += [f"checkpoint.every={SAVE}", f"eval.every={EVALUATE}", "eval.batches=8", "eval.final=all"]
    words += ["sample.every=0", "sample.max_new_tokens=4", "log.wandb=disabled", "run.threads=1", "run.timeout=120"]
    return [*words, f"data.dir={folder}/corpus", f"run.dir={folder}", f"run.name={name}", *more]


class Driver:
    """The run `killed`, its present life, and what was done to it."""

    def __init__(self, folder: Path, words: list[str], seed: int) -> None:
        self.folder, self.words, self.random = folder, words, random.Random(seed)
        self.metrics, self.checkpoints = folder / "killed" / "metrics.jsonl", folder / "killed" / "checkpoints"
        self.table: Counter[tuple[str, str]] = Counter()
        self.lives = self.lost = 0
        self.start_seconds = 5.0  # what a start took last
        self.it: Life | None = None
        self.workers: list[int] = []

    def go_on(self) -> Life:
        """The present life with both its ranks running, started if there is none."""
        if self.it is None:
            self.lives += 1
            self.it = Life(torchrun(self.words, "--max-restarts=1000"), self.folder / f"life{self.lives}")
        it, before = self.it, set(self.workers)
        it.wait_for(lambda: len(set(it.workers()) - before) == 2, "two new ranks", every=0.2)
        self.workers = it.workers()
        return it

    def kill(self, what: str, where: str) -> None:
        """Kill `what` as soon as the run is `where`, or a moment later; count where it really was."""
        it = self.go_on()
        started, first, said = time.monotonic(), self.newest(), it.out.count("parameters,")
        begun = lambda: it.out.count("parameters,") > said  # noqa: E731
        if where == "start":
            delay = self.random.uniform(0, self.start_seconds)
            it.wait_for(lambda: begun() or time.monotonic() - started > delay, "the start")
        else:
            it.wait_for(begun, "the start's last line", every=0.05)
            self.start_seconds = time.monotonic() - started
            resumed = it.out.rpartition("resumed from step ")[2].split()[0] if "resumed" in it.out else "0"
            assert int(resumed) == first, f"resumed from {resumed}, saved was {first}"
            at = self.last_step() + self.random.randint(1, 2 * SAVE)
            event = {
                "step": lambda: self.last_step() >= at,
                "save": lambda: self.last_step() >= at - SAVE and self.unfinished(),
                "evaluation": lambda: self.last_step() >= at - SAVE and self.evaluates(),
            }[where]
            it.wait_for(event, f"{where} after step {at}", every=0.002)
            time.sleep(self.random.uniform(0, 0.01))
        victims = {"one rank": [self.random.choice(self.workers)], "both ranks": self.workers, "torchrun": [it.pid]}
        for pid in victims[what]:
            os.kill(pid, signal.SIGKILL)
        if what == "torchrun":
            it.process.wait()
            self.it = None
        end = time.monotonic() + PATIENCE
        while set(self.workers) & set(processes()):  # the rest ends with them
            assert time.monotonic() < end, f"{what} was killed, {where}, and ranks live on"
            time.sleep(0.1)
        really = self.was(begun())
        self.table[what, really] += 1
        self.lost += self.last_step() - self.newest()
        told = f"kill {self.table.total()}: {what}, {really}, step {self.last_step()}, saved {self.newest()}"
        print(told, file=sys.stderr, flush=True)

    def was(self, begun: bool) -> str:
        """Where the run was, by what it left."""
        if not begun:
            return "start"
        return "save" if self.unfinished() else "evaluation" if self.evaluates() else "step"

    def last_line(self) -> dict[str, Any]:
        """Of metrics.jsonl, the last whole one."""
        try:
            with open(self.metrics, "rb") as file:
                file.seek(max(0, os.path.getsize(self.metrics) - 4096))
                lines = file.read().split(b"\n")[:-1]
            return json.loads(lines[-1])
        except (OSError, IndexError, ValueError):
            return {"kind": "none", "step": 0}

    def last_step(self) -> int:
        return int(self.last_line()["step"])

    def evaluates(self) -> bool:
        line = self.last_line()
        return line["kind"] == "train" and line["step"] % EVALUATE == 0

    def unfinished(self) -> bool:
        """Whether a save of the last step is under way."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        step = f"{self.last_step():08d}"
        return any(step in name and not re.fullmatch(r"step-\d{8}", name) for name in names)

    def newest(self) -> int:
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        return max((int(name[5:]) for name in names if re.fullmatch(r"step-\d{8}", name)), default=0)


def content(run: Path) -> dict[str, Any]:
    """What a run ended with: its losses and evaluations, and a hash of each tensor in the last checkpoint."""
    from safetensors import safe_open

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        "losses": [(x["step"], x["loss"], x["grad_norm"], x["tokens"]) for x in lines if x["kind"] == "train"],
        "evaluations": [(x["step"], x["loss"]) for x in lines if x["kind"] == "eval"],
    }
    for path in sorted(sorted((run / "checkpoints").glob("step-*"))[-1].glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                found[f"{path.name}: {name}"] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return found


def chaos(folder: Path, kills: int, seed: int, more: Sequence[str] = ()) -> str:
    """Does it, and returns the table. Raises AssertionError where the killed run differs from the other."""
    from data.prepare import main as prepare

    start = time.monotonic()
    assert 0 == prepare([w for w in settings(folder, "none", kills, more) if w.startswith("data.")])
    with life(torchrun(settings(folder, "whole", kills, more)), folder / "whole") as it:
        assert it.ends() == 0, it.err
    driver = Driver(folder, settings(folder, "killed", kills, more), seed)
    plan = [pair for _ in range(-(-kills // 12)) for pair in driver.random.sample(list(product(WHAT, WHERE)), 12)]
    try:
        for what, where in plan[:kills]:
            driver.kill(what, where)
        it = driver.go_on()
        assert it.ends() == 0, it.err
    finally:
        for pid in [driver.it.pid, *driver.it.workers()] if driver.it and driver.it.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
    whole, killed = content(folder / "whole"), content(folder / "killed")
    different = [key for key in whole | killed if whole.get(key) != killed.get(key)]
    assert not different, f"the killed run differs in {different}"
    rows = [f"| {what} | " + " | ".join(str(driver.table[what, where]) for where in WHERE) + " |" for what in WHAT]
    minutes = (time.monotonic() - start) / 60
    return "\n".join(
        [
            f"| killed | {' | '.join(WHERE)} |",
            "|---" * 5 + "|",
            *rows,
            "",
            f"{kills} kills (seed {seed}) in {len(whole['losses'])} steps and {minutes:.1f} minutes; {driver.lost} "
            f"steps were done twice. All losses, {len(whole['evaluations'])} evaluations and {len(whole) - 2} tensors "
            "of the last checkpoint, weights and moments, are bitwise those of the run that was left alone.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.chaos", description="Kill a run until it is done, and compare.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="for both runs")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(chaos(Path(folder), args.kills, args.seed, args.settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
