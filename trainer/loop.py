"""The loop of a run: steps, with evaluations, samples and checkpoints between them, and the end of the run.

Starting the same command again resumes from the newest checkpoint as if the run had never stopped. All ranks agree on
a request to stop in each step's message, and between the batches of an evaluation.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data.loader import Step
from data.settings import UserError
from model.precision import weights_unchanged
from parallel import collectives, fsdp
from trainer import machine
from trainer.config import Config
from trainer.evaluation import describe, evaluate
from trainer.fault_tolerance.errors import AlreadyFinished, Stopped
from trainer.fault_tolerance.signals import StopFlag, write_requeue_file
from trainer.fault_tolerance.watchdog import report_failures
from trainer.generate import Sampling, generate_text
from trainer.metrics import read_lines
from trainer.run import Run
from trainer.startup import checkpoint_fields, start
from trainer.step import train_step
from trainer.terminal import rank


def train(config: Config, stop: StopFlag | None = None) -> int:
    """Start the run of `config` in this process, or resume it, and train to its end. Returns the exit code.

    `stop` hears signals already; if it is None, they are heard from here on. Raises UserError, and RankFailed if
    another rank ended the run.
    """
    if stop is None:
        with StopFlag() as stop:
            return train(config, stop)
    try:
        with start(config, stop) as run:
            with report_failures(run.watchdog, config.train.micro_batch_size, config.data.seq_len):
                loop(run)
            return 1 if run.saver is not None and run.saver.failed else 0
    except AlreadyFinished as finished:
        if rank() == 0:
            print(finished)
        return 0
    except Stopped:  # before the first step
        return 0


def loop(run: Run) -> None:
    """Train until the last step, until train.stop_at, or until a signal; then finish the run, or save it."""
    try:
        raise_if_stopped(run)
        run_missed_evaluation(run)
        train_steps(run, min(run.steps, run.config.train.stop_at or run.steps))
        if run.step >= run.steps:
            finish(run)
        else:
            end_early(run, requeue=False)
    except Stopped as stopped:
        save_unless_saved(run)
        end_early(run, stopped.requeue)


def train_steps(run: Run, last: int) -> None:
    """Steps up to `last`, with the evaluations, samples and checkpoints that are due between them. Raises Stopped."""
    config, save_due = run.config, False
    assert run.saver is not None
    run.model.train()
    started = time.perf_counter()
    for batch, waited in timed_batches(run, last):
        result = train_step(run, batch)
        run.stop.step_done = True
        now = time.perf_counter()
        seconds, started = now - started, now
        speed = batch.real_tokens / seconds
        times = {"tokens_per_second": speed, "step_seconds": seconds, "data_seconds": waited}
        fields = {"tokens": run.tokens, **result.fields, **times, **device_fields(run, speed)}
        run.reporter.train(run.step, fields)
        if result.ready:
            run.saver.poll()
        raise_if_diverged(run)
        if result.stop:
            raise Stopped(result.requeue)
        if run.step < last:
            if due(config.eval.every, run.step):
                run_evaluation(run, config.eval.batches)
            if due(config.sample.every, run.step):
                run_samples(run)
        save_due = save_due or run.step == last or due(config.checkpoint.every, run.step)
        # Weights that gave no finite gradient may be bad: a save that is due then waits for a step that gives one.
        if run.step == run.steps or (save_due and not run.skipped):
            run.watchdog.mark("saving")
            run.saver.save(run.step, checkpoint_fields(run), wait=run.step == last)
            save_due = False
        started = time.perf_counter()


def timed_batches(run: Run, last: int) -> Iterator[tuple[Step, float]]:
    """The loader's steps up to `last`, and the seconds that the loop waited for each."""
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


def raise_if_diverged(run: Run) -> None:
    """Raises UserError after train.max_skipped steps in a row without a finite gradient."""
    limit = run.config.train.max_skipped
    if run.skipped >= limit:
        newest = run.saver.newest if run.saver is not None else None
        raise UserError(
            f"train.max_skipped={limit}: so many steps in a row had no finite gradient; "
            f"lower train.max_lr, and start again by the same command, from step {newest}"
        )


def raise_if_stopped(run: Run) -> None:
    """Raises Stopped on all ranks if one of them was asked to stop.

    Called before the first step, before each batch of an evaluation, and after each token of a sample.
    """
    run.watchdog.mark(run.watchdog.progress.phase)
    (requests,) = collectives.sum_over_ranks(torch.tensor([run.stop.requested, run.stop.requeue]))
    stop, requeue = (requests > 0).tolist()
    if stop:
        raise Stopped(requeue)


def device_fields(run: Run, tokens_per_second: float) -> dict[str, float]:
    """How a step used each device: TFLOP/s of the model, their share of the device's peak (MFU), and memory."""
    config = run.config
    flops = config.model.flops_per_token(run.tokenizer.vocab_size, config.data.seq_len)
    rate = flops * tokens_per_second / run.world.size
    peak = machine.peak_flops(run.device, run.dtype)
    mfu = {} if peak is None else {"mfu": rate / peak}
    return {"tflops": rate / 1e12, **mfu, **machine.memory_used(run.device)}


def run_missed_evaluation(run: Run) -> None:
    """The evaluation and the samples of the step resumed from, if a stop cut them short."""
    if 0 < run.step < run.steps:
        if due(run.config.eval.every, run.step) and not was_evaluated(run):
            run_evaluation(run, run.config.eval.batches)
        if due(run.config.sample.every, run.step) and not collectives.broadcast(samples_file(run).exists()):
            run_samples(run)


def was_evaluated(run: Run) -> bool:
    """Whether metrics.jsonl, as rank 0 sees it, has an evaluation of this step."""
    lines = read_lines(run.reporter.file.path) if run.world.rank == 0 else []
    return bool(collectives.broadcast(any(x["kind"] == "eval" and x["step"] == run.step for x in lines)))


def run_evaluation(run: Run, batches: int | str) -> None:
    run.watchdog.mark("evaluation")
    with weights_unchanged():
        line = evaluate(
            run.model, run.corpus, run.config, batches, run.world, before_batch=lambda: raise_if_stopped(run)
        )
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
            for piece in generate_text(run.model, run.tokenizer, prompt, sampling):
                pieces.append(piece)
                raise_if_stopped(run)
            stories.append("".join(pieces))
    run.reporter.write_text(samples_file(run), "\n\n---\n\n".join(stories) + "\n")
    return stories


def samples_file(run: Run) -> Path:
    return run.folder / "samples" / f"step-{run.step:08d}.txt"


def save_unless_saved(run: Run) -> None:
    """Finish the save that is under way, and save this step if it is not the newest and its gradient was finite."""
    run.watchdog.mark("saving")
    assert run.saver is not None
    run.saver.finish()
    if run.step != run.saver.newest and not run.skipped:
        run.saver.save(run.step, checkpoint_fields(run), wait=True)


def end_early(run: Run, requeue: bool) -> None:
    """End a run before its last step; `requeue`: the cluster is to start it again."""
    assert run.saver is not None
    if requeue and run.world.rank == 0:
        write_requeue_file(run.folder, run.step)
    run.watchdog.close()  # no rank waits for another from here on
    run.reporter.event(run.step, "stopped", requeue=requeue)
    run.reporter.close()
    saved = f"saved at {run.saver.newest}" if run.saver.newest else "nothing saved"
    run.reporter.log(f"stopped at step {run.step} of {run.steps}, {saved}; to resume: {command()}")


def finish(run: Run) -> None:
    """The end of a finished run: validation loss, a plot of the loss, a story, and commands to continue with."""
    if run.config.eval.final != "none" and not was_evaluated(run):
        run_evaluation(run, run.config.eval.final)
    stories = run_samples(run)
    run.watchdog.close()
    run.reporter.event(run.step, "finished")
    run.reporter.close()
    if run.world.rank != 0:
        return
    from trainer.report import plot_loss

    print(f"plot of the loss: {plot_loss(run.folder)}")
    print(f"\n{stories[0]}\n")
    if run.config.data.source == "storybook":
        from data.sources.storybook import derivable_sentences

        derivable, total = (sum(counts) for counts in zip(*map(derivable_sentences, stories), strict=True))
        print(f"{derivable} of {total} sentences in {len(stories)} stories can be derived from the storybook's grammar")
    print(
        f'generate:  python -m trainer.generate --checkpoint {run.folder} --prompt "{run.config.sample.prompts[0]}"\n'
        f"evaluate:  python -m trainer.evaluate --checkpoint {run.folder}\n"
        f"continue:  {command()} train.steps={2 * run.steps}"
    )


def command() -> str:
    """The command that started this run, as a user would type it; a script that did names itself in LAUNCHED_BY."""
    start = "python -m trainer.main"
    if "WORLD_SIZE" in os.environ:
        start = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')} -m trainer.main"
    return f"{os.environ.get('LAUNCHED_BY', start)} {shlex.join(sys.argv[1:])}".strip()
