"""From settings to a run that is ready for its next step: corpus, processes, model, checkpoint.

What cannot be is found here, most of it before any process group is made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.config import ConfigError, UserError, dump
from data.loader import Loader, Share, training_rows
from data.shards import Corpus
from data.tokenizer import Tokenizer
from model.transformer import Transformer
from parallel import fsdp, mesh
from parallel.mesh import Degrees, World
from trainer import checkpoint, machine
from trainer.config import Config
from trainer.faults import StopFlag
from trainer.metrics import Reporter
from trainer.optimizer import LossScale, learning_rate


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
    degrees: Degrees
    scale: LossScale
    report: Reporter
    stop: StopFlag
    step: int = 0  # finished steps
    tokens: int = 0  # targets that entered the loss so far
    skipped: int = 0  # steps in a row without a finite gradient

    @property
    def folder(self) -> Path:
        return self.config.run.folder


def open_corpus(config: Config, world: World, device: torch.device) -> tuple[Corpus, Tokenizer, Loader, int]:
    """The corpus, checked against the config, and the number of steps. Raises UserError."""
    if config.train.global_batch_size < world.size:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size}: fewer sequences than the {world.size} "
            "processes; raise it or start fewer"
        )
    degrees(config, world)
    corpus = Corpus.open(config.data.dir)
    corpus.check(config.data)
    tokenizer = corpus.tokenizer()
    if world.rank == 0:
        corpus.verify()
    rows = training_rows(corpus.split("train"), config.data, tokenizer.bos, tokenizer.pad)
    share = Share(config.train.global_batch_size, config.train.micro_batch_size, world.size)
    loader = Loader(rows, share, config.train.seed, world.rank, config.data.workers, pin=device.type == "cuda")
    return corpus, tokenizer, loader, steps_of(config, len(rows))


def degrees(config: Config, world: World) -> Degrees:
    """Degrees of parallelism that the processes make up. Raises ConfigError where they cannot."""
    p = config.parallel
    try:
        return mesh.degrees(world, config.model, p.replicate, p.shard, p.expert)
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
    rates = [learning_rate(config.train, manifest["step"], total) for total in (manifest["steps"], steps)]
    if rates[0] != rates[1]:
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


def build(config: Config, world: World, device: torch.device, vocab_size: int) -> tuple[Transformer, torch.dtype]:
    """The model on this rank, with its initial weights, and the dtype it computes in."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    wish = machine.choose_dtype(config.train.dtype, device)  # `auto` may try it out, and ranks may find otherwise
    dtype = dtypes[mesh.agree(dtypes.index(wish))]
    layout = mesh.make_mesh(degrees(config, world), device)
    model = fsdp.build(
        config.model, vocab_size, config.train.seed, device, dtype, layout, config.parallel.overlap,
        config.train.recompute, config.train.compile,
    )  # fmt: skip
    return model, dtype


def begin(run: Run, newest: Path | None, notes: list[str], threads: int) -> None:
    """Load the checkpoint or start a fresh run folder, and say which."""
    config, folder = run.config, run.folder
    if newest is not None:
        checkpoint.load(newest, run.model, run.optimizer)
        manifest = checkpoint.read_manifest(newest)
        run.step, run.tokens = manifest["step"], manifest["tokens"]
        run.scale = LossScale(**manifest.get("loss_scale", {}))
    if run.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump(config.sections()))
        run.report.file.cut(run.step if newest else -1)
    total, active = config.model.parameter_counts(run.tokenizer.vocab_size)
    share = run.loader.share
    run.report.say("fresh" if newest is None else f"resumed from step {run.step}")
    for note in notes:
        run.report.say(note)
    loss, without = machine.choose_loss(config.train.liger, run.device)
    run.model.head.loss = loss or run.model.head.loss
    if without:
        run.report.say(without)
    if advice := mesh.advice(run.world, config.model, run.degrees):
        run.report.say(advice)
    d, dtype = run.degrees, str(run.dtype).removeprefix("torch.")
    run.report.say(
        f"{folder}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active a token; {run.world.size} processes on "
        f"{run.device.type} (replicate {d.replicate} x shard {d.shard}, expert {d.expert}), {threads} threads each, "
        f"{dtype}; {run.steps} steps of {share.global_batch_size} x {config.data.seq_len} tokens"
    )
    run.report.start(run.step, run.steps, {k: v.model_dump() for k, v in config.sections().items()})
