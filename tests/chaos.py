"""Kills a run again and again, and checks that it ends as if nothing had happened.

    python -m tests.chaos --kills 100 [--seed 0] [section.key=value ...]

torchrun trains a tiny model on two ranks. SIGKILL ends one rank, both ranks, or torchrun itself: before the first step,
in a step, during a save, in an evaluation, at moments that a seed decides. torchrun restarts killed ranks; if torchrun
was killed, this program starts it again. At the end every loss, every evaluation and every tensor of the last
checkpoint must be bitwise equal to those of an undisturbed run. Prints a Markdown table of what was killed where.
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

from tests.support.launched_runs import EVENT_TIMEOUT_S, LaunchedRun, launched_run, living_processes, torchrun

SAVE_EVERY, EVALUATE_EVERY = 3, 5  # steps
STEPS_PER_KILL = 2 * SAVE_EVERY  # of the run's length: more than a generation does before it is killed
VICTIMS = ("one rank", "both ranks", "torchrun")
PHASES = ("start", "step", "save", "evaluation")


def settings(folder: Path, name: str, kills: int, more: Sequence[str]) -> list[str]:
    """The settings of a run in `folder` that is long enough for `kills` kills."""
    words = ["data.stories=300", "data.vocab_size=320", "data.seq_len=32", "data.validation=0.1"]
    words += ["model.dim=16", "model.n_layers=2", "model.n_heads=2", "model.expert_dim=16", "model.n_experts=5"]
    words += ["model.nope_every=2", "model.max_seq_len=512", "model.dropout=0.1", "train.dtype=float32"]
    words += [f"train.steps={STEPS_PER_KILL * kills + 20}", "train.global_batch_size=6", "train.micro_batch_size=2"]
    words += [f"checkpoint.every={SAVE_EVERY}", f"eval.every={EVALUATE_EVERY}", "eval.batches=8", "eval.final=all"]
    words += ["sample.every=0", "sample.max_new_tokens=4", "log.wandb=disabled", "run.threads=1", "run.timeout=120"]
    return [*words, f"data.dir={folder}/corpus", f"run.dir={folder}", f"run.name={name}", *more]


class Killer:
    """Starts the run `killed`, kills it, and counts what was killed where."""

    def __init__(self, folder: Path, words: list[str], seed: int) -> None:
        self.folder, self.words, self.random = folder, words, random.Random(seed)
        self.metrics, self.checkpoints = folder / "killed" / "metrics.jsonl", folder / "killed" / "checkpoints"
        self.kills: Counter[tuple[str, str]] = Counter()  # by victim and phase
        self.repeated_steps = 0  # steps that were done again after a kill
        self.torchrun_starts = 0
        self.start_seconds = 5.0  # duration of the last start
        self.run: LaunchedRun | None = None
        self.workers: list[int] = []

    def running(self) -> LaunchedRun:
        """The run with both its ranks alive. Starts torchrun if it does not run."""
        if self.run is None:
            self.torchrun_starts += 1
            command = torchrun(self.words, "--max-restarts=1000")
            self.run = LaunchedRun(command, self.folder / f"torchrun{self.torchrun_starts}")
        run, before = self.run, set(self.workers)
        run.wait_for(lambda: len(set(run.workers()) - before) == 2, "two new ranks", interval=0.2)
        self.workers = run.workers()
        return run

    def kill(self, victim: str, phase: str) -> None:
        """Kill the victim as soon as the run is in `phase`, or a moment later; count the phase it was really in."""
        run = self.running()
        started, newest = time.monotonic(), self.newest_checkpoint()
        starts_logged = run.out.count("parameters,")

        def has_started() -> bool:
            return run.out.count("parameters,") > starts_logged

        if phase == "start":
            delay = self.random.uniform(0, self.start_seconds)
            run.wait_for(lambda: has_started() or time.monotonic() - started > delay, "the start")
        else:
            run.wait_for(has_started, "the last line of the start", interval=0.05)
            self.start_seconds = time.monotonic() - started
            resumed = run.out.rpartition("resumed from step ")[2].split()[0] if "resumed" in run.out else "0"
            assert int(resumed) == newest, f"resumed from step {resumed}, but step {newest} was saved"
            step = self.last_step() + self.random.randint(1, 2 * SAVE_EVERY)
            event = {
                "step": lambda: self.last_step() >= step,
                "save": lambda: self.last_step() >= step - SAVE_EVERY and self.is_saving(),
                "evaluation": lambda: self.last_step() >= step - SAVE_EVERY and self.is_evaluating(),
            }[phase]
            run.wait_for(event, f"{phase} after step {step}", interval=0.002)
            time.sleep(self.random.uniform(0, 0.01))
        pids = {"one rank": [self.random.choice(self.workers)], "both ranks": self.workers, "torchrun": [run.pid]}
        for pid in pids[victim]:
            os.kill(pid, signal.SIGKILL)
        if victim == "torchrun":
            run.process.wait()
            self.run = None
        end = time.monotonic() + EVENT_TIMEOUT_S
        while set(self.workers) & living_processes().keys():  # the other ranks end, too
            assert time.monotonic() < end, f"{victim} was killed ({phase}), and ranks are still alive"
            time.sleep(0.1)
        actual_phase = self.phase() if has_started() else "start"
        self.kills[victim, actual_phase] += 1
        self.repeated_steps += self.last_step() - self.newest_checkpoint()
        print(
            f"kill {self.kills.total()}: {victim}, {actual_phase}, step {self.last_step()}, "
            f"newest checkpoint {self.newest_checkpoint()}",
            file=sys.stderr,
            flush=True,
        )

    def phase(self) -> str:
        """The phase that the run was in after its start, according to its files."""
        if self.is_saving():
            return "save"
        return "evaluation" if self.is_evaluating() else "step"

    def last_line(self) -> dict[str, Any]:
        """The last complete line of metrics.jsonl."""
        try:
            with open(self.metrics, "rb") as file:
                file.seek(max(0, os.path.getsize(self.metrics) - 4096))
                lines = file.read().split(b"\n")[:-1]
            return json.loads(lines[-1])
        except (OSError, IndexError, ValueError):
            return {"kind": "none", "step": 0}

    def last_step(self) -> int:
        return int(self.last_line()["step"])

    def is_evaluating(self) -> bool:
        line = self.last_line()
        return line["kind"] == "train" and line["step"] % EVALUATE_EVERY == 0

    def is_saving(self) -> bool:
        """Whether a save of the last step is in progress."""
        step = f"{self.last_step():08d}"
        return any(step in name and not re.fullmatch(r"step-\d{8}", name) for name in self.checkpoint_names())

    def newest_checkpoint(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        steps = (int(name[5:]) for name in self.checkpoint_names() if re.fullmatch(r"step-\d{8}", name))
        return max(steps, default=0)

    def checkpoint_names(self) -> list[str]:
        return os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []


def content(run: Path) -> dict[str, Any]:
    """The result of a run: its losses, its evaluations, and a hash of each tensor in the last checkpoint."""
    from safetensors import safe_open

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        "losses": [(x["step"], x["loss"], x["grad_norm"], x["tokens"]) for x in lines if x["kind"] == "train"],
        "evaluations": [(x["step"], x["loss"]) for x in lines if x["kind"] == "eval"],
    }
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                found[f"{path.name}: {name}"] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return found


def chaos(folder: Path, kills: int, seed: int, more: Sequence[str] = ()) -> str:
    """Run both runs and return the table. Raises AssertionError if the killed run differs from the undisturbed one."""
    from data.prepare import main as prepare

    start = time.monotonic()
    assert 0 == prepare([word for word in settings(folder, "whole", kills, more) if word.startswith("data.")])
    with launched_run(torchrun(settings(folder, "whole", kills, more)), folder / "whole") as run:
        assert run.wait() == 0, run.err
    killer = Killer(folder, settings(folder, "killed", kills, more), seed)
    plan: list[tuple[str, str]] = []
    while len(plan) < kills:  # every combination once, in random order, and so on
        combinations = list(product(VICTIMS, PHASES))
        plan += killer.random.sample(combinations, len(combinations))
    try:
        for victim, phase in plan[:kills]:
            killer.kill(victim, phase)
        run = killer.running()
        assert run.wait() == 0, run.err
    finally:
        if killer.run is not None and killer.run.process.poll() is None:
            for pid in [killer.run.pid, *killer.run.workers()]:
                os.kill(pid, signal.SIGKILL)
    whole, killed = content(folder / "whole"), content(folder / "killed")
    different = [key for key in whole | killed if whole.get(key) != killed.get(key)]
    assert not different, f"the killed run differs in {different}"
    minutes = (time.monotonic() - start) / 60
    return "\n".join(
        [
            f"| killed | {' | '.join(PHASES)} |",
            "|---" * (1 + len(PHASES)) + "|",
            *(f"| {victim} | {' | '.join(str(killer.kills[victim, p]) for p in PHASES)} |" for victim in VICTIMS),
            "",
            f"{kills} kills (seed {seed}) in {len(whole['losses'])} steps and {minutes:.1f} minutes; "
            f"{killer.repeated_steps} steps were done twice. All losses, {len(whole['evaluations'])} evaluations and "
            f"{len(whole) - 2} tensors of the last checkpoint (weights and moments) are bitwise equal to those of the "
            "undisturbed run.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.chaos", description="Kill a run again and again, and compare it with an undisturbed run."
    )
    parser.add_argument("--kills", type=int, default=20, help="how often to kill the run (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is killed when (default: 0)")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of both runs")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(chaos(Path(folder), args.kills, args.seed, args.settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
