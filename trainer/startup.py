"""From settings to a run that is ready for its next step: `start` is the one function that makes it so.

It checks what can be checked before any process group is made, and then connects the processes, locks the run's
folder, finds the checkpoint to resume from, builds the model, and loads the weights.
"""

import itertools
from contextlib import ExitStack
from dataclasses import asdict
from socket import gethostname
from typing import Any

import torch

from data.loader import BatchLayout, Loader, training_rows
from data.settings import ConfigError, UserError, dump
from data.shards import Corpus
from data.tokenizer import Tokenizer
from model.transformer import Transformer
from parallel import collectives, mesh, rendezvous
from parallel.build import build_model
from parallel.mesh import Degrees, World
from trainer import machine
from trainer.checkpoint.folder import Checkpoint, newest_checkpoint, none_usable, remove_partial
from trainer.checkpoint.load import checkpoint_tensors, load_checkpoint
from trainer.checkpoint.saver import Saver
from trainer.config import Config
from trainer.fault_tolerance.errors import AlreadyFinished, RankFailed
from trainer.fault_tolerance.processes import sibling_exited
from trainer.fault_tolerance.run_lock import RunLock, sees
from trainer.fault_tolerance.signals import StopFlag, clear_mark
from trainer.fault_tolerance.watchdog import Watchdog, report_failures
from trainer.hub.importer import InitialWeights, initial_weights
from trainer.hub.mapping import TRAINING_ONLY_KEYS
from trainer.machine import dtype_name
from trainer.metrics import Reporter, read_lines
from trainer.optimizer import LossScale, learning_rate, make_optimizer
from trainer.run import Run

DATA_ORDER_KEYS = ("train.global_batch_size", "train.seed", "data.seq_len", "data.pack")  # they decide the order
VISIBILITY_TIMEOUT_S = 10.0  # that a shared file system may take to show a file of another host
# Times run.timeout, for the collectives. The watchdog, which can say which rank is late, ends a run before that.
COLLECTIVE_TIMEOUT_FACTOR = 4
_restart_count = itertools.count()  # of the runs of this process


def start(config: Config, stop: StopFlag) -> Run:
    """A run that is ready for its next step. `stop` hears the signals of this process.

    Raises UserError; RankFailed if another rank failed; Stopped if a signal asked for the end meanwhile; and
    AlreadyFinished if there is nothing left to do.
    """
    world = World.from_environment()
    watchdog = Watchdog(world.rank, world.size, stop, config.run.timeout, config.run.folder)
    with ExitStack() as resources:
        resources.callback(watchdog.close)
        with report_failures(watchdog, config.train.micro_batch_size, config.data.seq_len):
            run = _prepare(config, world, watchdog, resources)
        run.resources = resources.pop_all()
    return run


def _prepare(config: Config, world: World, watchdog: Watchdog, resources: ExitStack) -> Run:
    if world.rank == 0:
        clear_mark(config.run.folder)
    machine.keep_freed_memory()
    store = _meet(config, world, watchdog)

    watchdog.mark("opening the corpus")
    if config.run.deterministic:
        machine.be_deterministic()
    device = machine.choose_device(config.run.device, world)
    machine.choose_compile(config.train.compile, device)  # raises before there is anything to undo
    threads = machine.set_threads(config.run.threads, world)
    corpus, tokenizer, loader, steps = open_corpus(config, world, device)

    watchdog.mark("connecting")
    rendezvous.connect(world, device, COLLECTIVE_TIMEOUT_FACTOR * config.run.timeout, store)
    resources.callback(rendezvous.disconnect)

    watchdog.mark("taking the run's folder")
    lock = lock_run_folder(config, world)
    if lock is not None:
        resources.callback(lock.release)
    found, skipped = find_checkpoint(config, corpus, tokenizer)
    _raise_if_finished(config, found, steps)
    weights = load_initial_weights(config, tokenizer) if found is None else None

    watchdog.mark("building the model")
    reporter = Reporter(config.run.folder, config.log, config.run.name or "run", world.rank == 0)
    resources.callback(reporter.close)
    model, dtype = build(config, world, device, tokenizer.vocab_size, found)
    run = Run(
        config=config,
        world=world,
        device=device,
        dtype=dtype,
        degrees=degrees(config, world),
        corpus=corpus,
        tokenizer=tokenizer,
        loader=loader,
        steps=steps,
        model=model,
        optimizer=make_optimizer(model, config.train),
        scale=LossScale.of(dtype),
        reporter=reporter,
        stop=watchdog.stop,
        watchdog=watchdog,
    )

    watchdog.mark("loading the checkpoint")
    load_state(run, found, skipped, threads, weights)
    run.saver = make_saver(run, lock)
    resources.callback(run.saver.close)

    watchdog.mark("the first message")
    if world.rank == 0:
        watchdog.enter()
    collectives.broadcast(None)  # rank 0 is past the point up to which all ranks end before the first step
    watchdog.enter()
    return run


def _meet(config: Config, world: World, watchdog: Watchdog) -> Any:
    """The store through which the processes of this start find one another; the watchdog starts with it."""
    try:
        store = rendezvous.join_store(world, config.run.timeout, lambda: watchdog.stop.asked and sibling_exited())
    except TimeoutError as error:
        raise RankFailed(str(error)) from None
    watchdog.begin(store and rendezvous.second_connection(store, f"watch/{next(_restart_count)}"))
    return store


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
    layout = BatchLayout(config.train.global_batch_size, config.train.micro_batch_size, world.size)
    loader = Loader(rows, layout, config.train.seed, world.rank, config.data.workers, pin=device.type == "cuda")
    return corpus, tokenizer, loader, number_of_steps(config, len(rows))


def degrees(config: Config, world: World) -> Degrees:
    """The degrees of parallelism. Raises ConfigError if they do not fit the processes or the model."""
    p = config.parallel
    try:
        return mesh.resolve_degrees(world, config.model, p.replicate, p.shard, p.expert)
    except mesh.MeshError as error:
        raise ConfigError(str(error)) from None


def number_of_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the whole run. With `train.epochs`, rows that do not fill a last step are not used."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, int(config.train.epochs * rows / config.train.global_batch_size))


def lock_run_folder(config: Config, world: World) -> RunLock | None:
    """The run's folder for this run alone; rank 0 holds the lock. Raises UserError, on all ranks together."""
    folder, lock, error = config.run.folder, None, None
    if world.rank == 0:
        try:
            lock = RunLock(folder)
            remove_partial(folder / "checkpoints")
        except UserError as reason:
            error = str(reason)
    lock_id, error = collectives.broadcast((lock and lock.id, error))
    if error is None:
        seen = sees(folder, lock_id, VISIBILITY_TIMEOUT_S)
        if host := collectives.first_error(None if seen else gethostname()):
            error = f"{folder}: {host} does not see the folder that rank 0 writes to; set run.dir= to a shared one"
    if error is not None:
        if lock is not None:
            lock.release()
        raise UserError(error)
    return lock


def find_checkpoint(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, None for a new run; and why newer checkpoints were skipped, a line each.

    Rank 0 looks. Raises UserError if there are checkpoints and none can be used, or if the folder belongs to another
    model or corpus.
    """
    folder = config.run.folder
    found, skipped = collectives.broadcast(
        newest_checkpoint(folder / "checkpoints") if collectives.rank() == 0 else None
    )
    if found is None:
        if skipped:
            raise UserError(none_usable(folder / "checkpoints", skipped))
        return None, []
    manifest = found.manifest
    may_change = {f"model.{key}" for key in TRAINING_ONLY_KEYS}
    differences = (d for d in changes(manifest["config"], config) if d.startswith("model."))
    if other := [d for d in differences if d.partition(":")[0] not in may_change]:
        raise UserError(f"{folder}: made with another model ({'; '.join(other)}); choose another run.name=")
    if manifest["tokenizer"] != tokenizer.hash:
        size = f"vocabulary {manifest['vocab_size']} -> {tokenizer.vocab_size}"
        raise UserError(f"{folder}: made with another tokenizer ({size}); choose another run.name=")
    if manifest["corpus"] != corpus.hash and not config.checkpoint.allow_other_corpus:
        raise UserError(
            f"{folder}: made with another corpus than {config.data.dir}; choose another run.name=, or continue with "
            "checkpoint.allow_other_corpus=true"
        )
    return found, skipped


def _raise_if_finished(config: Config, found: Checkpoint | None, steps: int) -> None:
    """Raises AlreadyFinished on all ranks if the run is over, its last evaluation included."""
    if found is None:
        return
    folder = config.run.folder
    ends = (x["step"] for x in read_lines(folder / "metrics.jsonl") if x.get("event") == "finished")
    if collectives.broadcast(found.step > steps or (found.step == steps and found.step in ends)):
        hint = "set run.name= for another run, or train.steps= to continue this one"
        raise AlreadyFinished(f"{folder}: finished at step {found.step}; {hint}")


def load_initial_weights(config: Config, tokenizer: Tokenizer) -> InitialWeights | None:
    """The weights that `train.init_from` names, None if it is not set. Raises UserError on all ranks if one does."""
    if config.train.init_from is None:
        return None
    weights, error = None, None
    try:
        weights = initial_weights(config.train.init_from, config.model, tokenizer.vocab_size)
    except UserError as reason:
        error = str(reason)
    if error := collectives.first_error(error):
        raise UserError(error)
    return weights


def build(
    config: Config, world: World, device: torch.device, vocab_size: int, found: Checkpoint | None
) -> tuple[Transformer, torch.dtype]:
    """The model on this rank, with its initial weights, and the dtype of its products."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    before = found.manifest["dtype"] if found and found.manifest["device"] == device.type else None
    # `auto` may time a product, whose result may differ between ranks
    requested = machine.choose_dtype(config.train.dtype, device, config.model.dim, before)
    dtype = dtypes[collectives.broadcast(dtypes.index(requested))]
    model = build_model(
        config.model,
        vocab_size,
        config.train.seed,
        device,
        dtype,
        mesh.make_mesh(degrees(config, world), device),
        config.parallel.overlap,
        config.train.recompute,
        machine.choose_compile(config.train.compile, device)[0],
    )
    return model, dtype


def load_state(
    run: Run, found: Checkpoint | None, skipped: list[str], threads: int, weights: InitialWeights | None
) -> None:
    """Load the checkpoint; or prepare the folder of a new run, and load its initial weights. Logs which, and how."""
    config, folder = run.config, run.folder
    notes: list[str] = []
    if found is not None:
        found, more = load_checkpoint(found, run.model, run.optimizer)
        notes = [f"skipped checkpoint {why}" for why in [*skipped, *more]]
        notes += resume_notes(found.manifest, run, threads)
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
    run.reporter.log("new run" if found is None else f"resumed from step {run.step}")
    loss, loss_note = machine.choose_loss(config.train.liger, run.device)
    run.model.head.loss = loss or run.model.head.loss
    masks = config.data.mask_documents and not config.model.attention_dropout
    notes += filter(
        None,
        (
            loss_note,
            machine.choose_compile(config.train.compile, run.device)[1],
            machine.without_flex(run.device) if masks else None,
            mesh.padding_warning(run.world, config.model, run.degrees),
        ),
    )
    for note in notes:
        run.reporter.log(note)
    run.reporter.log(describe(run, threads))
    run.reporter.start(run.step, run.steps, {k: v.model_dump() for k, v in config.sections().items()})


def describe(run: Run, threads: int) -> str:
    """The run in one line: size, processes, dtype, steps."""
    total, active = run.config.model.parameter_counts(run.tokenizer.vocab_size)
    d = run.degrees
    return (
        f"{run.folder}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active a token; {run.world.size} processes "
        f"on {run.device.type} (replicate {d.replicate} x shard {d.shard}, expert {d.expert}), {threads} threads "
        f"each, {dtype_name(run.dtype)}; {run.steps} steps of {run.config.train.global_batch_size} x "
        f"{run.config.data.seq_len} tokens"
    )


def resume_notes(manifest: dict[str, Any], run: Run, threads: int) -> list[str]:
    """What differs from the run that wrote the checkpoint, a line each."""
    different = changes(manifest["config"], run.config)
    notes = [f"changed since step {manifest['step']}: {d}" for d in different]
    if manifest["corpus"] != run.corpus.hash or any(d.partition(":")[0] in DATA_ORDER_KEYS for d in different):
        notes.append("the order of the data changes here: rows of this epoch may be repeated or left out")
    if manifest["corpus"] != run.corpus.hash:
        notes.append(f"continuing on another corpus, {run.config.data.dir}")
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
        notes.append(f"from here on losses are equal to rounding, not bitwise: {', '.join(moved)}")
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


def make_saver(run: Run, lock: RunLock | None) -> Saver:
    """What saves the run. The result of each save is logged."""

    def log(step: int, seconds: float, error: str | None) -> None:
        if error is None:
            run.reporter.event(run.step, "saved", at=step, seconds=seconds)
            return
        run.reporter.event(run.step, "save failed", at=step, why=error)
        run.reporter.log(f"checkpoint of step {step}: {error}; dropped on all ranks, the previous one stays")

    saver = Saver(
        run.folder / "checkpoints",
        checkpoint_tensors(run.model, run.optimizer),
        run.corpus.folder / "tokenizer.model",
        run.config.checkpoint,
        lock,
        log,
    )
    saver.newest = run.step
    if line := not_locked(collectives.gather(saver.image and saver.image.not_locked, saver.group)):
        run.reporter.log(line)
    return saver


def not_locked(reasons: list[str | None]) -> str | None:
    """The line for ranks whose staging memory could not be page-locked; reasons: why, of each rank, or None."""
    failed = [why for why in reasons if why is not None]
    if not failed:
        return None
    return (
        f"checkpoint.async_save=true: the staging memory of {len(failed)} of {len(reasons)} ranks could not be "
        f"page-locked ({failed[0]}); the run continues, and copies of a save from the GPU do not overlap with training"
    )


def checkpoint_fields(run: Run) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run besides the tensors: what a resume needs or compares."""
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
