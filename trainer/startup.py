"""From settings to a run that is ready for its next step: corpus, processes, model, checkpoint.

What cannot be is found here, most of it before any process group is made.
"""

from dataclasses import asdict
from socket import gethostname
from typing import Any

import torch

from data.loader import BatchLayout, Loader, training_rows
from data.settings import ConfigError, UserError, dump
from data.shards import Corpus
from data.tokenizer import Tokenizer
from model.transformer import Transformer
from parallel import collectives, mesh
from parallel.build import build_model
from parallel.mesh import Degrees, World
from trainer import machine
from trainer.checkpoint.folder import Checkpoint, newest_checkpoint, none_usable, remove_partial
from trainer.checkpoint.load import checkpoint_tensors, load_checkpoint
from trainer.checkpoint.saver import Saver
from trainer.config import Config
from trainer.fault_tolerance.run_lock import RunLock, sees
from trainer.hub.importer import InitialWeights, initial_weights
from trainer.hub.mapping import TRAINING_ONLY_KEYS
from trainer.machine import dtype_name
from trainer.optimizer import LossScale, learning_rate
from trainer.run import Run

ORDER = ("train.global_batch_size", "train.seed", "data.seq_len", "data.pack")  # what the order of the data hangs on
PATIENCE = 10.0  # seconds that a shared file system may take to show a file of another host


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
    share = BatchLayout(config.train.global_batch_size, config.train.micro_batch_size, world.size)
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


def lock_run_folder(config: Config, world: World) -> RunLock | None:
    """The run's folder for this run alone; the lock is rank 0's. Raises UserError, on all ranks together."""
    folder, lock, why = config.run.folder, None, None
    if world.rank == 0:
        try:
            lock = RunLock(folder)
            remove_partial(folder / "checkpoints")
        except UserError as error:
            why = str(error)
    lock_id, why = collectives.broadcast((lock and lock.id, why))
    if why is None:
        if host := collectives.first_error(None if sees(folder, lock_id, PATIENCE) else gethostname()):
            why = f"{folder}: {host} does not see the folder that rank 0 writes to; set run.dir= to a shared one"
    if why is not None:
        if lock is not None:
            lock.release()
        raise UserError(why)
    return lock


def find_checkpoint(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, None where the run is fresh; and why newer ones were passed over, a line each.

    Rank 0 looks. Raises UserError when none can be used, or the folder belongs to another model or corpus.
    """
    folder = config.run.folder
    found, why = collectives.broadcast(newest_checkpoint(folder / "checkpoints") if collectives.rank() == 0 else None)
    if found is None:
        if why:
            raise UserError(none_usable(folder / "checkpoints", why))
        return None, []
    manifest = found.manifest
    trained = {f"model.{key}" for key in TRAINING_ONLY_KEYS}
    differences = (d for d in changes(manifest["config"], config) if d.startswith("model."))
    if other := [d for d in differences if d.partition(":")[0] not in trained]:
        raise UserError(f"{folder}: made with another model ({'; '.join(other)}); choose another run.name=")
    if manifest["tokenizer"] != tokenizer.hash:
        size = f"vocabulary {manifest['vocab_size']} -> {tokenizer.vocab_size}"
        raise UserError(f"{folder}: made with another tokenizer ({size}); choose another run.name=")
    if manifest["corpus"] != corpus.hash and not config.checkpoint.allow_other_corpus:
        raise UserError(
            f"{folder}: made with another corpus than {config.data.dir}; choose another run.name=, or go on with "
            "checkpoint.allow_other_corpus=true"
        )
    return found, why


def weights_of_another(config: Config, tokenizer: Tokenizer) -> InitialWeights | None:
    """What train.init_from names, if anything. On all ranks together, for one may not see it. Raises UserError."""
    if config.train.init_from is None:
        return None
    weights, why = None, None
    try:
        weights = initial_weights(config.train.init_from, config.model, tokenizer.vocab_size)
    except UserError as error:
        why = str(error)
    if why := collectives.first_error(why):
        raise UserError(why)
    return weights


def notes_on(manifest: dict[str, Any], run: "Run", threads: int) -> list[str]:
    """What is not as it was when the checkpoint was written, a line each."""
    different = changes(manifest["config"], run.config)
    notes = [f"changed since step {manifest['step']}: {d}" for d in different]
    if manifest["corpus"] != run.corpus.hash or any(d.partition(":")[0] in ORDER for d in different):
        notes.append("the data does not go on where it was: rows of this epoch may come twice, or not at all")
    if manifest["corpus"] != run.corpus.hash:
        notes.append(f"goes on with another corpus, {run.config.data.dir}")
    before, after = (learning_rate(run.config.train, manifest["step"], n) for n in (manifest["steps"], run.steps))
    if before != after:
        steps = f"{run.steps} steps instead of {manifest['steps']}"
        notes.append(f"the learning rate now decays over {steps}: it jumps here")
    now = {
        "world": run.world.size,
        "degrees": asdict(run.degrees),
        "threads": threads,
        "device": run.device.type,
        "dtype": dtype_name(run.dtype),
        "torch": torch.__version__,
    }
    moved = [f"{key} {manifest[key]} -> {value}" for key, value in now.items() if manifest[key] != value]
    if moved:
        notes.append(f"from here on equal to rounding, not bitwise, since it was saved elsewhere: {', '.join(moved)}")
    return notes


def changes(before: dict[str, dict[str, Any]], config: Config) -> list[str]:
    """`section.key: old -> new` for each setting that differs from those of a checkpoint."""
    now = {name: section.model_dump() for name, section in config.sections().items()}
    return [
        f"{section}.{key}: {before.get(section, {}).get(key)} -> {value}"
        for section, keys in now.items()
        for key, value in keys.items()
        if key in before.get(section, {}) and before[section][key] != value and section != "run"
    ]


def build(
    config: Config, world: World, device: torch.device, vocab_size: int, found: Checkpoint | None
) -> tuple[Transformer, torch.dtype]:
    """The model on this rank, with its initial weights, and the dtype it computes in."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    before = found.manifest["dtype"] if found and found.manifest["device"] == device.type else None
    # `auto` may try it out, and ranks may find otherwise
    requested = machine.choose_dtype(config.train.dtype, device, config.model.dim, before)
    dtype = dtypes[collectives.broadcast(dtypes.index(requested))]
    layout = mesh.make_mesh(degrees(config, world), device)
    model = build_model(
        config.model,
        vocab_size,
        config.train.seed,
        device,
        dtype,
        layout,
        config.parallel.overlap,
        config.train.recompute,
        machine.choose_compile(config.train.compile, device)[0],
    )
    return model, dtype


def begin(
    run: Run, found: Checkpoint | None, passed_over: list[str], threads: int, weights: InitialWeights | None
) -> None:
    """Load the checkpoint, or start a fresh run folder (with the `weights` of another), and say which."""
    config, folder = run.config, run.folder
    notes: list[str] = []
    if found is not None:
        found, more = load_checkpoint(found, run.model, run.optimizer)
        notes = [f"passed over {why}" for why in [*passed_over, *more]]
        notes += notes_on(found.manifest, run, threads)
        run.step, run.tokens = found.step, found.manifest["tokens"]
        run.skipped = found.manifest["skipped"]
        run.scale = LossScale(**found.manifest["loss_scale"])
    elif weights is not None:
        weights.fill(run.model)
        notes = weights.notes
    if run.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump(config.sections()))
        run.reporter.file.cut(run.step if found else -1)
    total, active = config.model.parameter_counts(run.tokenizer.vocab_size)
    share = run.loader.share
    run.reporter.log("fresh" if found is None else f"resumed from step {run.step}")
    for note in notes:
        run.reporter.log(note)
    loss, without = machine.choose_loss(config.train.liger, run.device)
    run.model.head.loss = loss or run.model.head.loss
    for line in (without, machine.choose_compile(config.train.compile, run.device)[1]):
        if line:
            run.reporter.log(line)
    if config.data.mask_documents and not config.model.attention_dropout and (line := machine.without_flex(run.device)):
        run.reporter.log(line)
    if advice := mesh.advice(run.world, config.model, run.degrees):
        run.reporter.log(advice)
    d = run.degrees
    run.reporter.log(
        f"{folder}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active a token; {run.world.size} processes on "
        f"{run.device.type} (replicate {d.replicate} x shard {d.shard}, expert {d.expert}), {threads} threads each, "
        f"{dtype_name(run.dtype)}; {run.steps} steps of {share.global_batch_size} x {config.data.seq_len} tokens"
    )
    run.reporter.start(run.step, run.steps, {k: v.model_dump() for k, v in config.sections().items()})


def make_saver(run: Run, lock: RunLock | None) -> Saver:
    """What saves the run; what becomes of each save goes to the report."""

    def tell(step: int, seconds: float, why: str | None) -> None:
        if why is None:
            run.reporter.event(run.step, "saved", at=step, seconds=seconds)
            return
        run.reporter.event(run.step, "save failed", at=step, why=why)
        run.reporter.log(f"checkpoint of step {step}: {why}; dropped on all ranks, the one before stays")

    run.saver = Saver(
        run.folder / "checkpoints",
        checkpoint_tensors(run.model, run.optimizer),
        run.corpus.folder / "tokenizer.model",
        run.config.checkpoint,
        lock,
        tell,
    )
    if line := not_locked(collectives.gather(run.saver.image and run.saver.image.not_locked, run.saver.group)):
        run.reporter.log(line)
    return run.saver


def not_locked(reasons: list[str | None]) -> str | None:
    """The line for ranks whose staging memory could not be page-locked; reasons: why, of each rank, or None."""
    failed = [why for why in reasons if why is not None]
    if not failed:
        return None
    return (
        f"checkpoint.async_save=true: the staging memory of {len(failed)} of {len(reasons)} ranks could not be "
        f"page-locked ({failed[0]}); the run continues, and copies of a save from the GPU do not overlap with training"
    )


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
        "dtype": dtype_name(run.dtype),
    }
