"""The loop of a run: steps, with evaluations, samples and checkpoints between them, and the end of the run.

Starting the same command again resumes from the newest checkpoint as if the run had never stopped. `startup.py` makes
the run ready, and `step.py` is one optimizer step. All ranks agree on a request to stop in each step's message, and
between the batches of an evaluation. `fault_tolerance/watchdog.py` ends the run if a rank does not respond.
"""

import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from data.loader import Step
from data.settings import UserError
from model.precision import weights_unchanged
from parallel import collectives, fsdp, rendezvous
from parallel.mesh import World
from parallel.rendezvous import find_others, second_connection
from trainer import machine
from trainer.checkpoint.saver import Saver
from trainer.config import Config
from trainer.evaluate import describe, evaluate
from trainer.fault_tolerance.errors import RankFailed, Stopped, memory_error
from trainer.fault_tolerance.processes import sibling_exited
from trainer.fault_tolerance.signals import StopFlag, clear_mark, leave_mark
from trainer.fault_tolerance.watchdog import Watchdog
from trainer.generate import Sampling, text_of
from trainer.metrics import Reporter, read_lines
from trainer.optimizer import LossScale, make_optimizer
from trainer.run import Run
from trainer.startup import (
    begin,
    build,
    degrees,
    find_checkpoint,
    lock_run_folder,
    make_saver,
    open_corpus,
    state_of,
    weights_of_another,
)
from trainer.step import train_step

GENERATIONS = itertools.count()  # of runs in this process
BACKSTOP = 4  # times run.timeout, for the collectives: the watch, which can say who is late, ends a run before


def train(config: Config, stop: StopFlag | None = None) -> int:
    """Start or go on with the run of `config` in this process. Returns the exit code.

    `stop` hears signals already, else they are heard from here on. Raises UserError, and RankFailed when another rank
    ended the run.
    """
    if stop is None:
        with StopFlag() as stop:
            return train(config, stop)
    world = World.from_environment()
    watchdog = Watchdog(world.rank, world.size, stop, config.run.timeout, config.run.folder)
    with ExitStack() as at_end:
        at_end.callback(watchdog.close)
        try:
            return run_to_end(config, world, watchdog, at_end)
        except Stopped:
            return 0
        except Exception as error:  # told to the others before the connections to them close
            place, micro, length = watchdog.place, config.train.micro_batch_size, config.data.seq_len
            verdict = watchdog.verdict(memory_error(error, place.phase, place.step, micro, length) or error)
            if isinstance(verdict, Stopped):
                return 0
            if verdict is error:
                raise
            raise verdict from error


def run_to_end(config: Config, world: World, watchdog: Watchdog, at_end: ExitStack) -> int:
    """All of a run on this rank; returns the exit code. Raises Stopped if that is asked before its first step."""
    if world.rank == 0:
        clear_mark(config.run.folder)
    machine.keep_freed_memory()
    try:
        store = find_others(world, config.run.timeout, lambda: watchdog.stop.asked and sibling_exited())
    except TimeoutError as error:
        raise RankFailed(str(error)) from None
    watchdog.begin(store and second_connection(store, f"watch/{next(GENERATIONS)}"))
    watchdog.mark("opening the corpus")
    if config.run.deterministic:
        machine.be_deterministic()
    device = machine.choose_device(config.run.device, world)
    machine.choose_compile(config.train.compile, device)  # raises before there is anything to undo
    threads = machine.set_threads(config.run.threads, world)
    corpus, tokenizer, loader, steps = open_corpus(config, world, device)
    watchdog.mark("connecting")
    rendezvous.connect(world, device, BACKSTOP * config.run.timeout, store)
    at_end.callback(rendezvous.disconnect)
    watchdog.mark("taking the run's folder")
    lock = lock_run_folder(config, world)
    if lock is not None:
        at_end.callback(lock.release)
    found, passed_over = find_checkpoint(config, corpus, tokenizer)
    if found is not None and collectives.broadcast(finished(config.run.folder, found.step, steps)):
        if world.rank == 0:
            hint = "set run.name= for another run, train.steps= to go on"
            print(f"{config.run.folder}: finished at step {found.step}; {hint}")
        return 0
    weights = weights_of_another(config, tokenizer) if found is None else None
    watchdog.mark("building the model")
    reporter = Reporter(config.run.folder, config.log, config.run.name or "run", world.rank == 0)
    at_end.callback(reporter.close)
    model, dtype = build(config, world, device, tokenizer.vocab_size, found)
    optimizer, scale = make_optimizer(model, config.train), LossScale.of(dtype)
    run = Run(
        config,
        world,
        device,
        dtype,
        corpus,
        tokenizer,
        loader,
        steps,
        model,
        optimizer,
        degrees(config, world),
        scale,
        reporter,
        watchdog.stop,
        watchdog=watchdog,
    )
    watchdog.mark("loading the checkpoint")
    begin(run, found, passed_over, threads, weights)
    saver = make_saver(run, lock)
    at_end.callback(saver.close)
    saver.newest = run.step
    watchdog.mark("the first message")
    if world.rank == 0:
        watchdog.enter()
    collectives.broadcast(None)  # rank 0 is past the point where all end before the first step
    watchdog.enter()
    loop(run, saver)
    return 1 if saver.failed else 0


def loop(run: Run, saver: Saver) -> None:
    """Train until the last step, stop_at, or a signal; then the end of the run, if it is one."""
    requeue = False
    try:
        raise_if_stopped(run)
        run_missed_evaluation(run)
        train_steps(run, saver, min(run.steps, run.config.train.stop_at or run.steps))
        if run.step >= run.steps:
            return finish(run)
    except Stopped as stopped:
        requeue = stopped.requeue
        run.watchdog.mark("saving")
        saver.finish()
        if run.step != saver.newest and not run.skipped:
            saver.save(run.step, state_of(run), wait=True)
    if requeue and run.world.rank == 0:
        leave_mark(run.folder, run.step)
    run.watchdog.close()  # nobody waits for another any more
    run.reporter.event(run.step, "stopped", requeue=requeue)
    run.reporter.close()
    saved = f"saved at {saver.newest}" if saver.newest else "nothing saved"
    run.reporter.log(f"stopped at step {run.step} of {run.steps}, {saved}; to resume: {command()}")


def train_steps(run: Run, saver: Saver, last: int) -> None:
    """Steps up to `last`, and what falls due between them. Raises Stopped."""
    config, save_due = run.config, False
    run.model.train()
    started = time.perf_counter()
    for batch, waited in timed(run, last):
        result = train_step(run, batch)
        run.stop.stepped = True
        now = time.perf_counter()
        seconds, started = now - started, now
        run.reporter.train(
            run.step,
            {
                "tokens": run.tokens,
                **result.fields,
                "tokens_per_second": batch.real_tokens / seconds,
                "step_seconds": seconds,
                "data_seconds": waited,
                **device_fields(run, batch.real_tokens / seconds),
            },
        )
        if result.ready:
            saver.poll()
        if run.skipped >= config.train.max_skipped:
            raise UserError(
                f"train.max_skipped={config.train.max_skipped}: so many steps in a row had no finite gradient; "
                f"lower train.max_lr, and start again by the same command, from step {saver.newest}"
            )
        if result.stop:
            raise Stopped(result.requeue)
        if run.step < last:
            if due(config.eval.every, run.step):
                run_evaluation(run, config.eval.batches)
            if due(config.sample.every, run.step):
                run_samples(run)
        save_due = save_due or run.step == last or due(config.checkpoint.every, run.step)
        # weights that gave no finite gradient may be bad, and wait until they gave one
        if run.step == run.steps or (save_due and not run.skipped):
            run.watchdog.mark("saving")
            saver.save(run.step, state_of(run), wait=run.step == last)
            save_due = False
        started = time.perf_counter()


def device_fields(run: Run, tokens_per_second: float) -> dict[str, float]:
    """How a step used each device: TFLOP/s of the model, their part of the device's peak (MFU), and memory."""
    config = run.config
    flops = config.model.flops_per_token(run.tokenizer.vocab_size, config.data.seq_len)
    rate = flops * tokens_per_second / run.world.size
    peak = machine.peak_flops(run.device, run.dtype)
    mfu = {} if peak is None else {"mfu": rate / peak}
    return {"tflops": rate / 1e12, **mfu, **machine.memory_used(run.device)}


def run_missed_evaluation(run: Run) -> None:
    """The evaluation and the samples of the step resumed from, where a stop cut them short."""
    if 0 < run.step < run.steps:
        if due(run.config.eval.every, run.step) and not evaluated(run):
            run_evaluation(run, run.config.eval.batches)
        if due(run.config.sample.every, run.step) and not collectives.broadcast(samples_file(run).exists()):
            run_samples(run)


def evaluated(run: Run) -> bool:
    """Whether metrics.jsonl, as rank 0 sees it, holds an evaluation of this step."""
    lines = read_lines(run.reporter.file.path) if run.world.rank == 0 else []
    return bool(collectives.broadcast(any(x["kind"] == "eval" and x["step"] == run.step for x in lines)))


def finished(folder: Path, done: int, steps: int) -> bool:
    """Whether a run with a checkpoint of step `done` is over, its last evaluation included."""
    ends = (x["step"] for x in read_lines(folder / "metrics.jsonl") if x.get("event") == "finished")
    return done > steps or (done == steps and done in ends)


def raise_if_stopped(run: Run) -> None:
    """Before the first step or a batch of an evaluation, after a token: raises Stopped on all ranks where one asks."""
    run.watchdog.mark(run.watchdog.place.phase)
    (wishes,) = collectives.sum_over_ranks(torch.tensor([run.stop.asked, run.stop.requeue]))
    stop, requeue = (wishes > 0).tolist()
    if stop:
        raise Stopped(requeue)


def timed(run: Run, last: int) -> Iterator[tuple[Step, float]]:
    """The loader's steps up to `last`, each with the seconds that it was waited for."""
    batches = run.loader.steps(run.step, last)
    while True:
        run.watchdog.mark("data", run.step + 1)
        start = time.perf_counter()
        item = next(batches, None)
        if item is None:
            return
        yield item, time.perf_counter() - start


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def run_evaluation(run: Run, batches: int | str) -> None:
    run.watchdog.mark("evaluation")
    with weights_unchanged():
        line = evaluate(run.model, run.corpus, run.config, batches, run.world, between=lambda: raise_if_stopped(run))
    run.reporter.write("eval", run.step, **line)
    run.reporter.log(f"step {run.step}: {describe(line)}")


def run_samples(run: Run) -> list[str]:
    """A story for each prompt, by all ranks alike; rank 0 writes them to samples/."""
    run.watchdog.mark("sampling")
    config, stories = run.config.sample, []
    with weights_unchanged(), fsdp.gathered(run.model):
        for seed, prompt in enumerate(config.prompts, start=run.config.train.seed):
            sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, seed=seed)
            pieces = [prompt]
            for piece in text_of(run.model, run.tokenizer, prompt, sampling):
                pieces.append(piece)
                raise_if_stopped(run)
            stories.append("".join(pieces))
    run.reporter.write_text(samples_file(run), "\n\n---\n\n".join(stories) + "\n")
    return stories


def samples_file(run: Run) -> Path:
    return run.folder / "samples" / f"step-{run.step:08d}.txt"


def finish(run: Run) -> None:
    """The end of a run: validation loss, a loss picture, a story, and what to do next."""
    if run.config.eval.final != "none" and not evaluated(run):
        run_evaluation(run, run.config.eval.final)
    stories = run_samples(run)
    run.watchdog.close()
    run.reporter.event(run.step, "finished")
    run.reporter.close()
    if run.world.rank != 0:
        return
    from trainer.report import plot_loss

    print(f"loss picture: {plot_loss(run.folder)}")
    print(f"\n{stories[0]}\n")
    if run.config.data.source == "storybook":
        from data.sources.storybook import derivable_sentences

        counts = [derivable_sentences(story) for story in stories]
        told, all_of_them = (sum(column) for column in zip(*counts, strict=True))
        print(f"{told} of {all_of_them} sentences in {len(stories)} stories are ones the storybook could tell")
    print(
        f'generate:  python -m trainer.generate --checkpoint {run.folder} --prompt "{run.config.sample.prompts[0]}"\n'
        f"evaluate:  python -m trainer.evaluate --checkpoint {run.folder}\n"
        f"go on:     {command()} train.steps={2 * run.steps}"
    )


def command() -> str:
    """The command that started this run, as a user would type it; a script that did says its name in LAUNCHED_BY."""
    start = "python -m trainer.main"
    if "WORLD_SIZE" in os.environ:
        start = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')} -m trainer.main"
    return f"{os.environ.get('LAUNCHED_BY', start)} {shlex.join(sys.argv[1:])}".strip()
