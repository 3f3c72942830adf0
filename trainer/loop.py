"""The run: one state object, one loop.

Starting the same command again goes on from the newest checkpoint as if never stopped. `start.py` makes the run ready,
`step.py` is one optimizer step; here they follow one another, with evaluations, samples and checkpoints between.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from data.config import UserError
from data.loader import Step
from parallel import fsdp, mesh
from parallel.mesh import World
from trainer import checkpoint, machine
from trainer.config import Config
from trainer.evaluate import describe, evaluate
from trainer.faults import StopFlag
from trainer.generate import Sampling, text_of
from trainer.lock import Lock
from trainer.metrics import Reporter
from trainer.optimizer import LossScale, make_optimizer
from trainer.saver import Saver
from trainer.start import Run, begin, build, degrees, find_checkpoint, open_corpus, take_folder
from trainer.step import train_step


def train(config: Config) -> int:
    """Start or go on with the run of `config` in this process. Returns the exit code. Raises UserError."""
    world = World.from_environment()
    machine.keep_freed_memory()
    if config.run.deterministic:
        machine.be_deterministic()
    if config.train.compile:
        machine.check_compiler()
    device = machine.choose_device(config.run.device, world)
    threads = machine.set_threads(config.run.threads, world)
    corpus, tokenizer, loader, steps = open_corpus(config, world, device)
    mesh.connect(world, device, config.run.timeout)
    with ExitStack() as at_end:
        at_end.callback(mesh.disconnect)
        lock = take_folder(config, world)
        if lock is not None:
            at_end.callback(lock.release)
        found, passed_over = find_checkpoint(config, corpus, tokenizer)
        if found is not None and found.step >= steps:
            if world.rank == 0:
                hint = "set run.name= for another run, train.steps= to go on"
                print(f"{config.run.folder}: finished at step {found.step}; {hint}")
            return 0
        report = Reporter(config.run.folder, config.log, config.run.name or "run", world.rank == 0)
        at_end.callback(report.close)
        model, dtype = build(config, world, device, tokenizer.vocab_size)
        optimizer, scale = make_optimizer(model, config.train), LossScale.of(dtype)
        stop = at_end.enter_context(StopFlag())
        run = Run(
            config, world, device, dtype, corpus, tokenizer, loader, steps, model, optimizer,
            degrees(config, world), scale, report, stop,
        )  # fmt: skip
        begin(run, found, passed_over, threads)
        saver = make_saver(run, lock)
        at_end.callback(saver.close)
        loop(run)
        return 1 if saver.failed else 0


def loop(run: Run) -> None:
    """Train until the last step, stop_at, or a signal."""
    config, last = run.config, min(run.steps, run.config.train.stop_at or run.steps)
    assert run.saver is not None
    run.saver.newest = run.step
    steps = timed(run.loader.steps(run.step, last))
    run.model.train()
    started = time.perf_counter()
    for batch, waited in steps:
        result = train_step(run, batch)
        now = time.perf_counter()
        seconds, started = now - started, now
        run.report.train(
            run.step,
            {
                "tokens": run.tokens, **result.fields, "tokens_per_second": batch.real_tokens / seconds,
                "step_seconds": seconds, "data_seconds": waited,
            },
        )  # fmt: skip
        if result.ready:
            run.saver.advance()
        if run.skipped >= config.train.max_skipped:
            raise UserError(
                f"train.max_skipped={config.train.max_skipped}: so many steps in a row had no finite gradient; "
                "lower train.max_lr, and start again from the last checkpoint by the same command"
            )
        if due(config.eval.every, run.step) and run.step < last:
            run_evaluation(run, config.eval.batches)
        if due(config.sample.every, run.step) and run.step < last:
            run_samples(run)
        ends = result.stop or run.step == last
        if due(config.checkpoint.every, run.step) or ends:
            run.saver.save(run.step, state_of(run), wait=ends)
        if result.stop:
            break
        started = time.perf_counter()
    if run.step < run.steps:
        run.report.event(run.step, "stopped")
        run.report.close()
        saved = f"saved at {run.saver.newest}" if run.saver.newest else "nothing saved"
        run.report.say(f"stopped at step {run.step} of {run.steps}, {saved}; to resume: {command()}")
    else:
        finish(run)


def timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """Each item with the seconds that it was waited for."""
    while True:
        start = time.perf_counter()
        item = next(steps, None)
        if item is None:
            return
        yield item, time.perf_counter() - start


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def run_evaluation(run: Run, batches: int | str) -> None:
    line = evaluate(run.model, run.corpus, run.config, batches, run.world)
    run.report.write("eval", run.step, **line)
    run.report.say(f"step {run.step}: {describe(line)}")


def run_samples(run: Run) -> list[str]:
    """A story for each prompt, by all ranks alike; rank 0 writes them to samples/."""
    config, stories = run.config.sample, []
    with fsdp.gathered(run.model):
        for seed, prompt in enumerate(config.prompts, start=run.config.train.seed):
            sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, seed=seed)
            stories.append(prompt + "".join(text_of(run.model, run.tokenizer, prompt, sampling)))
    if run.world.rank == 0:
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        (folder / f"step-{run.step:08d}.txt").write_text("\n\n---\n\n".join(stories) + "\n", encoding="utf-8")
    return stories


def make_saver(run: Run, lock: Lock | None) -> Saver:
    """What saves the run; what becomes of each save goes to the report."""

    def tell(step: int, seconds: float, why: str | None) -> None:
        if why is None:
            run.report.event(run.step, "saved", at=step, seconds=seconds)
            return
        run.report.event(run.step, "save failed", at=step, why=why)
        run.report.say(f"checkpoint of step {step}: {why}; dropped on all ranks, the one before stays")

    run.saver = Saver(
        run.folder / "checkpoints", checkpoint.tensors(run.model, run.optimizer), run.corpus.folder / "tokenizer.model",
        run.config.checkpoint, lock, tell,
    )  # fmt: skip
    return run.saver


def state_of(run: Run) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run, besides the tensors: all that a resume needs, or compares."""
    return {
        "config": {name: section.model_dump() for name, section in run.config.sections().items()},
        "steps": run.steps,
        "tokens": run.tokens,
        "skipped": run.skipped,
        "loss_scale": asdict(run.scale),
        "vocab_size": run.tokenizer.vocab_size,
        "tokenizer": run.tokenizer.hash,
        "corpus": run.corpus.hash,
        "torch": torch.__version__,
        "world": run.world.size,
        "degrees": asdict(run.degrees),
        "threads": torch.get_num_threads(),
        "device": run.device.type,
    }


def finish(run: Run) -> None:
    """The end of a run: validation loss, a loss picture, a story, and what to do next."""
    if run.config.eval.final != "none":
        run_evaluation(run, run.config.eval.final)
    stories = run_samples(run)
    run.report.event(run.step, "finished")
    run.report.close()
    if run.world.rank != 0:
        return
    from trainer.report import plot_loss

    print(f"loss picture: {plot_loss(run.folder)}")
    print(f"\n{stories[0]}\n")
    if run.config.data.source == "storybook":
        from data.storybook import derivable_sentences

        counts = [derivable_sentences(story) for story in stories]
        told, all_of_them = (sum(column) for column in zip(*counts, strict=True))
        print(f"{told} of {all_of_them} sentences in {len(stories)} stories are ones the storybook could tell")
    print(
        f"generate:  python -m trainer.generate --checkpoint {run.folder} --prompt \"{run.config.sample.prompts[0]}\"\n"
        f"evaluate:  python -m trainer.evaluate --checkpoint {run.folder}\n"
        f"go on:     {command()} train.steps={2 * run.steps}"
    )


def command() -> str:
    """The command that started this run, as a user would type it."""
    words = " ".join(sys.argv[1:])
    size = os.environ.get("WORLD_SIZE")
    start = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}" if size else "python"
    return f"{start} -m trainer.main {words}".strip()


