"""The training loop: steps, with evaluations, samples and checkpoints between them, and the end of the run.

If the same command is started again, the run resumes from its newest checkpoint as if it had never stopped. A request
to stop may reach any rank; all ranks agree on it in the all-reduce of each step, before each batch of an evaluation,
and after each generated token of a sample.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.loader import Step
from data.settings import UserError
from model.precision import weights_unchanged
from parallel import collectives, fsdp
from trainer import devices, machine
from trainer.config import Config
from trainer.evaluation import describe_evaluation, evaluate
from trainer.fault_tolerance.errors import AlreadyFinished, Stopped
from trainer.fault_tolerance.signals import StopFlag, write_requeue_file
from trainer.fault_tolerance.watchdog import report_failures
from trainer.generate import Sampling, generate_text
from trainer.metrics import read_lines
from trainer.resume import checkpoint_fields
from trainer.run import Run
from trainer.startup import start
from trainer.step import train_step
from trainer.terminal import rank


def train(config: Config, stop: StopFlag | None = None) -> int:
    """Start or resume the run of `config` in this process, and train to its end.

    Returns 1 if the last save failed, else 0.

    `stop` receives the signals of this process; if it is None, a new one is installed for the time of this call. Raises
    UserError for a user error, if the training diverged, and if memory ran out; and RankFailed if another rank ended
    the run.
    """
    if stop is None:
        with StopFlag() as stop:
            return train(config, stop)
    try:
        with start(config, stop) as run:
            with report_failures(run.watchdog, config.train.micro_batch_size, config.data.seq_len):
                loop(run)
            has_failed_save = run.saver is not None and run.saver.failed
            return 1 if has_failed_save else 0
    except AlreadyFinished as message:
        if rank() == 0:
            print(message)
        return 0
    except Stopped:  # during the start; `loop` handles a stop after it
        return 0


def loop(run: Run) -> None:
    """Train until the last step, until train.stop_at, or until a signal; then finish or save the run."""
    try:
        raise_if_stopped(run)
        run_missed_evaluation_and_samples(run)
        train_steps(run, min(run.steps, run.config.train.stop_at or run.steps))
        if run.step >= run.steps:
            finish(run)
        else:
            end_early(run, requeue=False)
    except Stopped as stopped:
        save_unless_saved(run)
        end_early(run, stopped.requeue)


def train_steps(run: Run, last: int) -> None:
    """Train up to step `last`, with the evaluations, samples and checkpoints that are due.

    Raises Stopped on all ranks if one of them was asked to stop, and UserError if the training diverged.
    """
    config = run.config
    save_due = False
    assert run.saver is not None
    run.model.train()
    started = time.perf_counter()
    for batch, data_seconds in timed_batches(run, last):
        result = train_step(run, batch)
        run.stop.step_done = True
        step_seconds = time.perf_counter() - started
        report_step(run, result.fields, batch.real_tokens, step_seconds, data_seconds)
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
        if run.step == last or due(config.checkpoint.every, run.step):
            save_due = True
        # If the last steps were skipped, the weights may be bad: a save that is due waits for a step that is not
        # skipped. Only the last step of the run is always saved.
        if run.step == run.steps or (save_due and not run.skipped_steps):
            run.watchdog.mark("saving")
            run.saver.save(run.step, checkpoint_fields(run), wait=run.step == last)
            save_due = False
        started = time.perf_counter()  # here, so that evaluations, samples and saves are not part of a step's time


def report_step(run: Run, fields: dict[str, Any], real_tokens: int, step_seconds: float, data_seconds: float) -> None:
    """Write the `train` line of a finished step: the fields of `train_step`, times, and how the device was used."""
    tokens_per_second = real_tokens / step_seconds
    run.reporter.train(
        run.step,
        {
            "tokens": run.tokens,
            **fields,
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            **device_fields(run, tokens_per_second),
        },
    )


def timed_batches(run: Run, last: int) -> Iterator[tuple[Step, float]]:
    """The batches of the steps up to `last`, each with the seconds that the loop waited for it."""
    batches = run.loader.steps(run.step, last)
    while True:
        run.watchdog.mark("data", run.step + 1)
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def due(every: int, step: int) -> bool:
    """Whether `step` is a multiple of `every`; never if `every` is 0."""
    return every > 0 and step % every == 0


def raise_if_diverged(run: Run) -> None:
    """Raises UserError after train.max_skipped consecutive steps whose loss or gradient was not finite."""
    limit = run.config.train.max_skipped
    if run.skipped_steps >= limit:
        newest = run.saver.newest if run.saver is not None else None
        raise UserError(
            f"train.max_skipped={limit}: {limit} consecutive steps had no finite gradient; "
            f"lower train.max_lr and start again; the run resumes from step {newest}"
        )


def raise_if_stopped(run: Run) -> None:
    """Raises Stopped on all ranks if one of them was asked to stop.

    Called before the first step, before each batch of an evaluation, and after each generated token.
    """
    run.watchdog.mark(run.watchdog.progress.phase)
    (requests,) = collectives.sum_over_ranks(torch.tensor([run.stop.requested, run.stop.requeue]))
    stop_requests, requeue_requests = requests.tolist()
    if stop_requests > 0:
        raise Stopped(requeue=requeue_requests > 0)


def device_fields(run: Run, tokens_per_second: float) -> dict[str, float]:
    """How a step used each device: the model's TFLOP/s, their fraction of the device's peak (MFU), and memory."""
    config = run.config
    flops_per_token = config.model.flops_per_token(run.tokenizer.vocab_size, config.data.seq_len)
    flops_per_second = flops_per_token * tokens_per_second / run.world.size
    fields = {"tflops": flops_per_second / 1e12}
    peak = devices.peak_flops(run.device, run.dtype)
    if peak is not None:
        fields["mfu"] = flops_per_second / peak
    return fields | machine.memory_used(run.device)


def run_missed_evaluation_and_samples(run: Run) -> None:
    """Run the evaluation and the samples of the resumed step if a stop interrupted or prevented them."""
    if run.step == 0 or run.step >= run.steps:
        return
    if due(run.config.eval.every, run.step) and not was_evaluated(run):
        run_evaluation(run, run.config.eval.batches)
    if due(run.config.sample.every, run.step) and not collectives.broadcast(samples_file(run).exists()):
        run_samples(run)


def was_evaluated(run: Run) -> bool:
    """Whether metrics.jsonl, which rank 0 reads for all, has an evaluation of this step."""
    lines = read_lines(run.reporter.file.path) if run.world.rank == 0 else []
    found = any(line["kind"] == "eval" and line["step"] == run.step for line in lines)
    return bool(collectives.broadcast(found))


def run_evaluation(run: Run, batches: int | str) -> None:
    """Evaluate `batches` validation batches (`all` or a number), and report the result.

    Raises Stopped if a rank was asked to stop.
    """
    run.watchdog.mark("evaluation")
    with weights_unchanged():
        line = evaluate(
            run.model, run.corpus, run.config, batches, run.world, before_batch=lambda: raise_if_stopped(run)
        )
    run.reporter.write("eval", run.step, **line)
    run.reporter.log(f"step {run.step}: {describe_evaluation(line)}")


def run_samples(run: Run) -> list[str]:
    """Sample a story for each prompt. All ranks compute the same stories, and rank 0 writes them to samples/.

    Raises Stopped if a rank was asked to stop.
    """
    run.watchdog.mark("sampling")
    config = run.config.sample
    stories = []
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
    """The file of the samples of this step."""
    return run.folder / "samples" / f"step-{run.step:08d}.txt"


def save_unless_saved(run: Run) -> None:
    """Finish a save in progress; then save this step, unless it is saved already or its gradient was not finite."""
    run.watchdog.mark("saving")
    assert run.saver is not None
    run.saver.finish()
    if run.step != run.saver.newest and not run.skipped_steps:
        run.saver.save(run.step, checkpoint_fields(run), wait=True)


def end_early(run: Run, requeue: bool) -> None:
    """End a run before its last step. requeue: write the `requeue` file, so that the cluster starts the run again."""
    assert run.saver is not None
    if requeue and run.world.rank == 0:
        write_requeue_file(run.folder, run.step)
    run.watchdog.close()  # safe to close: no more collectives
    run.reporter.event(run.step, "stopped", requeue=requeue)
    run.reporter.close()
    saved = f"saved at {run.saver.newest}" if run.saver.newest else "no checkpoint was saved"
    run.reporter.log(f"stopped at step {run.step} of {run.steps}, {saved}; to resume: {command()}")


def finish(run: Run) -> None:
    """End a finished run: evaluate, plot the loss, and print a story and commands to continue with."""
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
        print_derivable(stories)
    print(
        f'generate:  python -m trainer.generate --checkpoint {run.folder} --prompt "{run.config.sample.prompts[0]}"\n'
        f"evaluate:  python -m trainer.evaluate --checkpoint {run.folder}\n"
        f"continue:  {command()} train.steps={2 * run.steps}"
    )


def print_derivable(stories: list[str]) -> None:
    """Print how many sentences of the stories the storybook's grammar can derive."""
    from data.sources.storybook import derivable_sentences

    derivable = total = 0
    for story in stories:
        derivable_here, total_here = derivable_sentences(story)
        derivable += derivable_here
        total += total_here
    print(f"{derivable} of {total} sentences in {len(stories)} stories can be derived from the storybook's grammar")


def command() -> str:
    """A command that starts this run again, with the settings of this process.

    A script that starts the trainer (launch/torchrun.py, launch/slurm/) sets LAUNCHED_BY to its own command. Otherwise
    the command is rebuilt from the variables that torchrun sets, which do not include its flags for several machines
    (--nnodes, --node_rank, --master_addr): add them.
    """
    launcher = "python -m trainer.main"
    if "WORLD_SIZE" in os.environ:
        launcher = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')} -m trainer.main"
    launcher = os.environ.get("LAUNCHED_BY", launcher)
    return f"{launcher} {shlex.join(sys.argv[1:])}".strip()
