"""The start of a run: `start` turns settings into a `Run` that is ready for its next step, new or resumed.

It first connects to the key-value store of this launch, through which the watchdogs of the ranks communicate. Next it
checks everything that can be checked without a process group. Then it creates the process group, locks the run's
folder, finds the checkpoint to resume from, builds the model, and loads the weights.
"""

import itertools
from contextlib import ExitStack
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
from trainer import devices, machine
from trainer.checkpoint.folder import Checkpoint, remove_partial
from trainer.checkpoint.load import checkpoint_tensors, load_checkpoint
from trainer.checkpoint.saver import Saver
from trainer.config import Config
from trainer.fault_tolerance.errors import RankFailed
from trainer.fault_tolerance.processes import sibling_exited
from trainer.fault_tolerance.run_lock import RunLock, lock_is_visible
from trainer.fault_tolerance.signals import StopFlag, remove_requeue_file
from trainer.fault_tolerance.watchdog import Watchdog, report_failures
from trainer.hub.importer import InitialWeights, initial_weights
from trainer.machine import dtype_name
from trainer.metrics import Reporter
from trainer.optimizer import LossScale, make_optimizer
from trainer.resume import find_checkpoint, raise_if_finished, resume_notes
from trainer.run import Run
from trainer.terminal import plural

VISIBILITY_TIMEOUT_S = 10.0  # how long a shared file system may need to show a file that another host wrote
# Collectives time out after this factor times run.timeout, so that the watchdog, which names the late rank, acts first.
COLLECTIVE_TIMEOUT_FACTOR = 4
_launch_number = itertools.count()  # counts the calls of `start` in this process


def start(config: Config, stop: StopFlag) -> Run:
    """A run that is ready for its next step. `stop` receives the signals of this process.

    Raises UserError for a user error and if memory runs out, RankFailed if another rank failed, Stopped if a signal
    asked this run to stop during the start, and AlreadyFinished if the run has no steps left. If anything is raised,
    all that was opened is closed.
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
    """The stages of `start`, in their order. What has to be closed is added to `resources`."""
    if world.rank == 0:
        remove_requeue_file(config.run.folder)
    machine.keep_freed_memory()
    store = _connect_store(config, world, watchdog)

    watchdog.mark("opening the corpus")
    if config.run.deterministic:
        machine.be_deterministic()
    device = devices.choose_device(config.run.device, world)
    machine.choose_compile(config.train.compile, device)  # raises ConfigError, before the process group is created
    threads = machine.set_threads(config.run.threads, world)
    corpus, tokenizer, loader, steps = open_corpus(config, world, device)

    watchdog.mark("connecting")
    rendezvous.connect(world, device, COLLECTIVE_TIMEOUT_FACTOR * config.run.timeout, store)
    resources.callback(rendezvous.disconnect)

    watchdog.mark("preparing the folder and weights")
    lock = lock_run_folder(config, world)
    if lock is not None:
        resources.callback(lock.release)
    found, skipped_checkpoints = find_checkpoint(config, corpus, tokenizer)
    raise_if_finished(config, found, steps)
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

    watchdog.mark("loading weights")
    notes = load_state(run, found, skipped_checkpoints, threads, weights)
    prepare_folder(run, resumes=found is not None)
    notes += choose_kernels(run)
    log_start(run, notes, threads)
    run.saver = make_saver(run, lock)
    resources.callback(run.saver.close)

    watchdog.mark("waiting for all ranks")
    # Until `enter_steps`, the watchdogs end a stopped run; after it, the steps do. Rank 0 enters first, so all ranks
    # agree which.
    if world.rank == 0:
        watchdog.enter_steps()
    collectives.broadcast(None)
    watchdog.enter_steps()
    return run


def _connect_store(config: Config, world: World, watchdog: Watchdog) -> Any:
    """Connect to the store shared by this launch's processes, start the watchdog on it, and return it."""
    try:
        store = rendezvous.join_store(world, config.run.timeout, lambda: watchdog.stop.requested and sibling_exited())
    except TimeoutError as error:
        raise RankFailed(str(error)) from None
    prefix = f"watch/{next(_launch_number)}"
    watchdog.start(None if store is None else rendezvous.second_connection(store, prefix))
    return store


def open_corpus(config: Config, world: World, device: torch.device) -> tuple[Corpus, Tokenizer, Loader, int]:
    """The corpus, its tokenizer, the loader, and the number of steps of the run.

    Raises UserError if the corpus is damaged, or does not fit the config.
    """
    if config.train.global_batch_size < world.size:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size}: fewer sequences than the {world.size} "
            "processes; raise it or start fewer processes"
        )
    degrees(config, world)  # raises ConfigError
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
    """Lock the run's folder, and check that all hosts see it. Returns the lock on rank 0, which holds it, else None.

    Raises UserError on all ranks if the folder is in use or cannot be written.
    """
    folder = config.run.folder
    lock = None
    error = None
    if world.rank == 0:
        try:
            lock = RunLock(folder)
            remove_partial(folder / "checkpoints")
        except UserError as reason:
            error = str(reason)
    lock_id = None if lock is None else lock.id
    lock_id, error = collectives.broadcast((lock_id, error))
    if error is None:
        is_visible = lock_is_visible(folder, lock_id, VISIBILITY_TIMEOUT_S)
        host = collectives.first_error(None if is_visible else gethostname())
        if host is not None:
            error = (
                f"{folder}: {host} does not see the folder that rank 0 writes to; "
                "set run.dir to a folder that all hosts share"
            )
    if error is not None:
        if lock is not None:
            lock.release()
        raise UserError(error)
    return lock


def load_initial_weights(config: Config, tokenizer: Tokenizer) -> InitialWeights | None:
    """The weights that `train.init_from` names, None if it is not set. If one rank fails, raises UserError on all."""
    if config.train.init_from is None:
        return None
    weights = None
    error = None
    try:
        weights = initial_weights(config.train.init_from, config.model, tokenizer.vocab_size)
    except UserError as reason:
        error = str(reason)
    error = collectives.first_error(error)
    if error is not None:
        raise UserError(error)
    return weights


def build(
    config: Config, world: World, device: torch.device, vocab_size: int, found: Checkpoint | None
) -> tuple[Transformer, torch.dtype]:
    """This rank's shard of the model, with initial weights, and the dtype of its matrix multiplications."""
    previous = found.manifest["dtype"] if found and found.manifest["device"] == device.type else None
    # Ranks could measure different times for `auto`, so rank 0 decides.
    chosen = machine.choose_dtype(config.train.dtype, device, config.model.dim, previous)
    dtype = getattr(torch, collectives.broadcast(dtype_name(chosen)))
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
    run: Run, found: Checkpoint | None, skipped_checkpoints: list[str], threads: int, weights: InitialWeights | None
) -> list[str]:
    """Load the checkpoint, or the initial weights of a new run. Returns lines to log about them.

    If the checkpoint is damaged, the newest one before it is loaded.
    """
    if found is not None:
        loaded, more_skipped = load_checkpoint(found, run.model, run.optimizer)
        run.step = loaded.step
        run.tokens = loaded.manifest["tokens"]
        run.skipped_steps = loaded.manifest["skipped"]
        run.scale = LossScale(**loaded.manifest["loss_scale"])
        skipped_notes = [f"skipped checkpoint {reason}" for reason in [*skipped_checkpoints, *more_skipped]]
        return [f"resumed from step {run.step}", *skipped_notes, *resume_notes(loaded.manifest, run, threads)]
    if weights is not None:
        weights.fill(run.model)
        return ["new run", *weights.notes]
    return ["new run"]


def prepare_folder(run: Run, resumes: bool) -> None:
    """Write the settings into the run's folder, and remove lines of metrics.jsonl after the step of the checkpoint."""
    if run.world.rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(dump(run.config.sections()))
        run.reporter.file.cut(run.step if resumes else -1)


def choose_kernels(run: Run) -> list[str]:
    """Set the loss function of `train.liger`, and report unavailable kernels (Liger, compile, FlexAttention).

    Returns a line to log for each of them.
    """
    config = run.config
    loss, loss_note = machine.choose_loss(config.train.liger, run.device)
    if loss is not None:
        run.model.head.loss = loss
    _, compile_note = machine.choose_compile(config.train.compile, run.device)
    uses_flex = config.data.mask_documents and not config.model.attention_dropout
    flex_note = machine.without_flex(run.device) if uses_flex else None
    return [note for note in (loss_note, compile_note, flex_note) if note is not None]


def log_start(run: Run, notes: list[str], threads: int) -> None:
    """Log the notes and a description of the run, and start the progress bar and wandb."""
    mesh_note = mesh.padding_warning(run.world, run.config.model, run.degrees)
    if mesh_note is not None:
        notes = [*notes, mesh_note]
    for note in [*notes, describe_run(run, threads)]:
        run.reporter.log(note)
    settings = {name: section.model_dump() for name, section in run.config.sections().items()}
    run.reporter.start(run.step, run.steps, settings)


def describe_run(run: Run, threads: int) -> str:
    """The run in one line: parameters, processes, device, dtype, steps."""
    total, active = run.config.model.parameter_counts(run.tokenizer.vocab_size)
    d = run.degrees
    mesh_text = f"replicate {d.replicate} x shard {d.shard}, expert {d.expert}"
    return (
        f"{run.folder}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active per token; "
        f"{plural(run.world.size, 'process')} on {run.device.type} ({mesh_text}), "
        f"{plural(threads, 'thread')} each, {dtype_name(run.dtype)}; "
        f"{run.steps} steps of {run.config.train.global_batch_size} x {run.config.data.seq_len} tokens"
    )


def make_saver(run: Run, lock: RunLock | None) -> Saver:
    """The object that saves checkpoints of the run. It logs the result of each save."""

    def log(step: int, seconds: float, error: str | None) -> None:
        if error is None:
            run.reporter.event(run.step, "saved", at=step, seconds=seconds)
            return
        run.reporter.event(run.step, "save failed", at=step, why=error)
        run.reporter.log(f"checkpoint of step {step}: {error}; dropped on all ranks, the previous one is kept")

    saver = Saver(
        run.folder / "checkpoints",
        checkpoint_tensors(run.model, run.optimizer),
        run.corpus.folder / "tokenizer.model",
        run.config.checkpoint,
        lock,
        log,
    )
    saver.newest = run.step
    reason = None if saver.staging is None else saver.staging.page_lock_error
    line = page_lock_note(collectives.gather(reason, saver.group))
    if line is not None:
        run.reporter.log(line)
    return saver


def page_lock_note(reasons: list[str | None]) -> str | None:
    """The line to log if the staging memory of some rank could not be page-locked.

    reasons: why not, for each rank, or None if it could.
    """
    failed = [why for why in reasons if why is not None]
    if not failed:
        return None
    return (
        f"checkpoint.async_save=true: the staging memory of {len(failed)} of {len(reasons)} ranks could not be "
        f"page-locked ({failed[0]}); the run continues, and copies of a save from the GPU do not overlap with training"
    )
