"""The run: one state object, one loop.

A step: the loader's micro-batches go forward and backward, gradients are reduced on the last; one message sums norm,
loss, loads and the wish to stop over all ranks; clip, AdamW, balance bias; a line of metrics; perhaps an evaluation,
a sample, a checkpoint. Starting the same command again goes on from the newest checkpoint as if never stopped.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.config import ConfigError, UserError, dump
from data.loader import Loader, Share, Step, training_rows
from data.shards import Corpus
from data.tokenizer import Tokenizer
from model.moe import Router
from model.random import place_seed, sequence_keys
from model.transformer import Transformer
from parallel import fsdp, gradients, mesh
from parallel.mesh import World
from trainer import checkpoint, machine
from trainer.config import Config
from trainer.evaluate import describe, evaluate
from trainer.faults import StopFlag
from trainer.generate import Sampling, text_of
from trainer.metrics import Reporter
from trainer.optimizer import learning_rate, make_optimizer


@dataclass
class Run:
    """All that a run is, on one rank."""

    config: Config
    world: World
    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    tokenizer: Tokenizer
    loader: Loader
    steps: int  # of the whole run
    model: Transformer
    optimizer: torch.optim.AdamW
    report: Reporter
    stop: StopFlag
    step: int = 0  # finished steps
    tokens: int = 0  # targets that entered the loss so far
    skipped: int = 0  # steps in a row without a finite gradient

    @property
    def folder(self) -> Path:
        return self.config.run.folder


def train(config: Config) -> int:
    """Start or go on with the run of `config` in this process. Returns the exit code. Raises UserError."""
    world = World.from_environment()
    machine.keep_freed_memory()
    device = machine.choose_device(config.run.device, world)
    threads = machine.set_threads(config.run.threads, world)
    corpus, tokenizer, loader, steps = open_corpus(config, world, device)
    newest, notes = find_checkpoint(config, corpus, steps)
    if newest is not None and (done := checkpoint.read_manifest(newest)["step"]) >= steps:
        if world.rank == 0:
            print(f"{config.run.folder}: finished at step {done}; set run.name= for another run, train.steps= to go on")
        return 0
    mesh.connect(world, device, config.run.timeout)
    report = Reporter(config.run.folder, config.log, config.run.name or "run", world.rank == 0)
    try:
        low = mesh.agree(machine.choose_dtype(config.train.dtype, device) == torch.bfloat16)  # `auto` may try it out
        dtype = torch.bfloat16 if low else torch.float32
        layout = mesh.make_mesh(world, device, config.parallel.replicate, config.parallel.shard)
        model = fsdp.build(config.model, tokenizer.vocab_size, config.train.seed, device, dtype, layout)
        optimizer = make_optimizer(model, config.train)
        with StopFlag() as stop:
            run = Run(
                config, world, device, dtype, corpus, tokenizer, loader, steps, model, optimizer, report, stop
            )  # fmt: skip
            begin(run, newest, notes, threads)
            loop(run)
    finally:
        report.close()
        mesh.disconnect()
    return 0


def open_corpus(config: Config, world: World, device: torch.device) -> tuple[Corpus, Tokenizer, Loader, int]:
    """The corpus, checked against the config, and the number of steps. Raises UserError."""
    if config.train.global_batch_size < world.size:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size}: fewer sequences than the {world.size} "
            "processes; raise it or start fewer"
        )
    mesh_degrees(config, world)
    corpus = Corpus.open(config.data.dir)
    corpus.check(config.data)
    tokenizer = corpus.tokenizer()
    if world.rank == 0:
        corpus.verify()
    rows = training_rows(corpus.split("train"), config.data, tokenizer.bos, tokenizer.pad)
    share = Share(config.train.global_batch_size, config.train.micro_batch_size, world.size)
    loader = Loader(rows, share, config.train.seed, world.rank, config.data.workers, pin=device.type == "cuda")
    return corpus, tokenizer, loader, steps_of(config, len(rows))


def mesh_degrees(config: Config, world: World) -> tuple[int, int]:
    """(replicate, shard) that the processes make up. Raises ConfigError where they cannot."""
    try:
        return mesh.degrees(world.size, config.parallel.replicate, config.parallel.shard)
    except mesh.MeshError as error:
        raise ConfigError(str(error)) from None


def steps_of(config: Config, rows: int) -> int:
    """Optimizer steps of the whole run; a part of a step that epochs leave over is not taken."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, int(config.train.epochs * rows / config.train.global_batch_size))


def find_checkpoint(config: Config, corpus: Corpus, steps: int) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, None where the run is fresh; and what changed since, a line each.

    Raises UserError when the run folder belongs to another model or corpus.
    """
    folder = config.run.folder
    found = checkpoint.complete(folder / "checkpoints")
    if not found:
        return None, []
    manifest = checkpoint.read_manifest(found[-1])
    differences = changes(manifest["config"], config)
    other = [d for d in differences if d.startswith("model.")]
    if other:
        raise UserError(f"{folder}: made with another model ({'; '.join(other)}); choose another run.name=")
    if manifest["corpus"] != corpus.hash:
        raise UserError(f"{folder}: made with another corpus than {config.data.dir}; choose another run.name=")
    notes = [f"changed since step {manifest['step']}: {difference}" for difference in differences]
    if manifest["steps"] != steps and config.train.schedule != "constant" and config.train.decay_steps is None:
        notes.append(f"the learning rate now decays over {steps} steps instead of {manifest['steps']}: it jumps here")
    return found[-1], notes


def changes(before: dict[str, dict[str, Any]], config: Config) -> list[str]:
    """`section.key: old -> new` for each setting that differs from those of a checkpoint."""
    now = {name: section.model_dump() for name, section in config.sections().items()}
    return [
        f"{section}.{key}: {before.get(section, {}).get(key)} -> {value}"
        for section, keys in now.items()
        for key, value in keys.items()
        if key in before.get(section, {}) and before[section][key] != value and section != "run"
    ]


def begin(run: Run, newest: Path | None, notes: list[str], threads: int) -> None:
    """Load the checkpoint or start a fresh run folder, and say which."""
    config, folder = run.config, run.folder
    if newest is not None:
        checkpoint.load(newest, run.model, run.optimizer)
        manifest = checkpoint.read_manifest(newest)
        run.step, run.tokens = manifest["step"], manifest["tokens"]
    if run.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump(config.sections()))
        run.report.file.cut(run.step if newest else -1)
    total, active = config.model.parameter_counts(run.tokenizer.vocab_size)
    share = run.loader.share
    run.report.say("fresh" if newest is None else f"resumed from step {run.step}")
    for note in notes:
        run.report.say(note)
    run.report.say(
        f"{folder}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active a token; {run.world.size} processes on "
        f"{run.device.type}, {threads} threads each, {str(run.dtype).removeprefix('torch.')}; "
        f"{run.steps} steps of {share.global_batch_size} x {config.data.seq_len} tokens"
    )
    run.report.start(run.step, run.steps, {k: v.model_dump() for k, v in config.sections().items()})


def loop(run: Run) -> None:
    """Train until the last step, stop_at, or a signal."""
    config, last = run.config, min(run.steps, run.config.train.stop_at or run.steps)
    saved = run.step
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
        if run.skipped >= config.train.max_skipped:
            raise UserError(
                f"train.max_skipped={config.train.max_skipped}: so many steps in a row had no finite gradient; "
                "lower train.max_lr, and start again from the last checkpoint by the same command"
            )
        if due(config.eval.every, run.step) and run.step < last:
            run_evaluation(run, config.eval.batches)
        if due(config.sample.every, run.step) and run.step < last:
            run_samples(run)
        if due(config.checkpoint.every, run.step) or result.stop or run.step == last:
            save(run)
            saved = run.step
        if result.stop:
            break
        started = time.perf_counter()
    if run.step < run.steps:
        run.report.event(run.step, "stopped")
        run.report.close()
        run.report.say(f"stopped at step {run.step} of {run.steps}, saved at {saved}; to resume: {command()}")
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


@dataclass
class StepResult:
    fields: dict[str, Any]  # for metrics.jsonl
    stop: bool  # some rank was asked to stop


def train_step(run: Run, batch: Step) -> StepResult:
    """One optimizer step. A step without a finite loss and gradient moves nothing, on all ranks together."""
    config, model = run.config.train, run.model
    loss, loads = backward(run, batch)
    parts = gradients.local_gradients(model)
    square = gradients.sum_of_squares(parts, run.config.parallel.replicate)
    stop = torch.tensor(float(run.stop.asked), device=run.device)
    total_square, total_loss, total_loads, stops = gradients.sum_over_ranks(
        square.to(run.device), loss, loads.to(run.device), stop
    )
    norm, mean_loss = math.sqrt(float(total_square)), float(total_loss)
    rate = learning_rate(config, run.step, run.steps)
    if math.isfinite(norm) and math.isfinite(mean_loss):
        run.skipped = 0
        if config.clip > 0:
            gradients.scale(parts, min(1.0, config.clip / (norm + 1e-6)))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        move_biases(model, total_loads, run.config.model.balance_rate)
    else:
        run.skipped += 1
        run.report.event(run.step + 1, "skipped", loss=str(mean_loss), grad_norm=str(norm))
        run.report.say(f"step {run.step + 1}: loss {mean_loss}, gradient norm {norm}: skipped on all ranks")
    run.optimizer.zero_grad()
    run.step += 1
    run.tokens += batch.real_tokens
    fields = {"loss": mean_loss, "lr": rate, "grad_norm": norm}
    if len(total_loads):
        fields["expert_load_max"] = float((total_loads.amax(1) / total_loads.mean(1).clamp(min=1e-9)).max())
        fields["idle_experts"] = int((total_loads == 0).sum())
    return StepResult(fields, float(stops) > 0)


def backward(run: Run, batch: Step) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss over the global batch. Returns this rank's share of the loss, and its loads.

    The one place that divides: each micro-batch's sum by the count of real tokens over all ranks.
    """
    config = run.config
    loss = torch.zeros((), dtype=torch.float64, device=run.device)
    loads: Tensor | int = 0
    if config.model.attention_dropout:  # fused attention takes no keys: the same on the same mesh only
        torch.manual_seed(place_seed(f"{config.train.seed}/{run.step}/{run.world.rank}"))
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        last = number == len(batch.micro_batches)
        fsdp.reduce_gradients(run.model, last or config.train.reduce == "every")
        b = micro_batch.to(run.device)
        keys = sequence_keys(config.train.seed, run.step, b.index) if config.model.dropout else None
        output = run.model(b.tokens, b.targets, b.positions, b.documents, keys)
        (output.loss / max(1, batch.real_tokens)).backward()
        loss += output.loss.detach().double() / max(1, batch.real_tokens)
        loads = loads + output.loads
    assert isinstance(loads, Tensor)
    return loss, loads


@torch.no_grad()
def move_biases(model: Transformer, loads: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load) for each expert (arXiv:2408.15664, algorithm 1); loads (layers, E)."""
    if rate == 0:
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, load in zip(routers, loads, strict=True):
        direction = torch.sign(load.sum() - load * len(load))
        router.bias += rate * direction.to(router.bias)


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


def save(run: Run) -> None:
    manifest = {
        "config": {name: section.model_dump() for name, section in run.config.sections().items()},
        "steps": run.steps,
        "tokens": run.tokens,
        "vocab_size": run.tokenizer.vocab_size,
        "tokenizer": run.tokenizer.hash,
        "corpus": run.corpus.hash,
        "torch": torch.__version__,
        "world": run.world.size,
        "threads": torch.get_num_threads(),
        "device": run.device.type,
    }
    checkpoint.save(
        run.folder / "checkpoints", run.step, run.model, run.optimizer, manifest, run.corpus.folder / "tokenizer.model",
        run.config.checkpoint.keep,
    )  # fmt: skip


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


