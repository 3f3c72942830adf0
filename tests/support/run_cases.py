"""Runs, steps and saves that take seconds, for processes of the pool and for this process."""

import hashlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from data.settings import UserError
from data.shards import Corpus
from model.moe import Router
from model.transformer import Transformer
from parallel import fsdp, mesh
from parallel.build import build_model
from parallel.mesh import World
from tests.support.configs import PRIME_MODEL, run_arguments
from trainer import startup
from trainer.checkpoint.folder import complete_checkpoints, open_checkpoint
from trainer.checkpoint.load import checkpoint_tensors, load_checkpoint, weights_digest
from trainer.checkpoint.saver import Saver
from trainer.config import CheckpointConfig, Config, TrainConfig, read_config
from trainer.fault_tolerance.signals import StopFlag
from trainer.fault_tolerance.watchdog import Watchdog
from trainer.loop import train
from trainer.metrics import Reporter, read_lines
from trainer.optimizer import LossScale, make_optimizer
from trainer.run import Run
from trainer.startup import degrees, load_initial_weights, open_corpus
from trainer.step import train_step


def config(corpus: Path, runs: Path, *more: str) -> Config:
    return read_config(None, run_arguments(corpus, runs, *more))


def run(corpus: Path, runs: Path, *more: str) -> int:
    return train(config(corpus, runs, *more))


def run_in_pool(corpus: str, runs: str, more: list[str]) -> int:
    """`run` with arguments that the pool can send to its processes."""
    return run(Path(corpus), Path(runs), *more)


def deterministic_run(corpus: str, runs: str, more: list[str]) -> tuple[bool, str]:
    """A run with run.deterministic. Returns whether torch was deterministic, and cuBLAS's setting; resets both."""
    try:
        assert run(Path(corpus), Path(runs), "run.deterministic=true", *more) == 0
        return torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def initial_digests(places: list[str], run: str, expert: int) -> list[str]:
    """Digests of models that are initialized, on these processes, with the weights of each of some folders."""
    from trainer.checkpoint.load import load_model
    from trainer.hub.importer import initial_weights

    world, cpu = World.from_environment(), torch.device("cpu")
    _, tokenizer, settings = load_model(Path(run))
    device_mesh = mesh.make_mesh(mesh.resolve_degrees(world, settings.model, 1, "auto", expert), cpu)
    digests = []
    for place in places:
        model = build_model(settings.model, tokenizer.vocab_size, 5, cpu, torch.float32, device_mesh)
        initial_weights(place, settings.model, tokenizer.vocab_size).fill(model)
        digests.append(weights_digest(model))
    return digests


def missing_on_rank_1(corpus: str, place: str, more: list[str]) -> str:
    """The error on this rank if rank 1 does not have the folder of the initial weights."""
    where = f"{place}-gone" if World.from_environment().rank == 1 else place
    settings = config(Path(corpus), Path("none"), *more, f"train.init_from={where}")
    try:
        load_initial_weights(settings, Corpus.open(corpus).tokenizer())
    except UserError as error:
        return str(error)
    return "no error"


def losses(folder: Path) -> list[float]:
    """Training losses of a run by step; the steps must be 1, 2, 3, ..."""
    lines = [x for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
    assert [x["step"] for x in lines] == list(range(1, len(lines) + 1))
    return [x["loss"] for x in lines]


def last_digest(folder: Path) -> str:
    """The digest of weights and biases in a run's newest checkpoint."""
    from trainer.checkpoint.load import load_model

    return weights_digest(load_model(complete_checkpoints(folder / "checkpoints")[-1])[0])


def new_run(corpus: Path, *more: str) -> Run:
    """A run before its first step, in this process, without a folder."""
    settings = config(corpus, Path("none"), *more)
    run = unsaved_run(settings, World(), torch.float32)
    run.model.train()
    return run


def unsaved_run(settings: Config, world: World, dtype: torch.dtype) -> Run:
    """A run on the CPU that has neither a folder nor a saver, and reports nothing."""
    cpu = torch.device("cpu")
    corpus, tokenizer, loader, steps = open_corpus(settings, world, cpu)
    run_degrees = degrees(settings, world)
    model = build_model(
        settings.model,
        tokenizer.vocab_size,
        settings.train.seed,
        cpu,
        dtype,
        mesh.make_mesh(run_degrees, cpu),
        settings.parallel.overlap,
        settings.train.recompute,
        settings.train.compile is True,
    )
    return Run(
        config=settings,
        world=world,
        device=cpu,
        dtype=dtype,
        degrees=run_degrees,
        corpus=corpus,
        tokenizer=tokenizer,
        loader=loader,
        steps=steps,
        model=model,
        optimizer=make_optimizer(model, settings.train),
        scale=LossScale.of(dtype),
        reporter=Reporter(Path("none"), settings.log, "none", False),
        stop=StopFlag(),
        watchdog=Watchdog(),
    )


Steps = tuple[list[dict[str, Any]], dict[str, np.ndarray], float]


def steps(corpus: str, dtype: str, more: list[str]) -> Steps:
    """Five optimizer steps without a run folder, each of 12 rows in two micro-batches.

    Returns the fields of each step, the weights, and the smallest distance between the score of an expert that was
    chosen and of one that was not: rounding may decide a near tie, so meshes can be compared only without near ties.
    """
    world = World.from_environment()
    compute_dtype = getattr(torch, dtype)
    micro_batch_size = -(-12 // (2 * world.size))
    settings = config(
        Path(corpus),
        Path("none"),
        *["train.steps=5", "train.global_batch_size=12", f"train.micro_batch_size={micro_batch_size}"],
        *["model.dropout=0.1", "train.clip=0.3", "train.warmup_steps=2", *more],
    )
    torch.set_default_dtype(torch.float64 if compute_dtype == torch.float64 else torch.float32)
    try:
        run = unsaved_run(settings, world, compute_dtype)
        gaps = [float("inf")]
        for module in run.model.modules():
            if isinstance(module, Router) and world.size == 1:
                module.register_forward_hook(lambda router, inputs, _: gaps.append(smallest_score_gap(router, *inputs)))
        run.model.train()
        fields = [train_step(run, run.loader.step(step)).fields for step in range(5)]
        weights = {}
        for name, tensor in checkpoint_tensors(run.model).items():
            weights[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy()
        return fields, weights, min(gaps)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def smallest_score_gap(router: Router, x: torch.Tensor, is_real: torch.Tensor, *_: object) -> float:
    """The smallest distance, over real tokens, between the scores of the last chosen expert and of the next one."""
    scores = (x[is_real].to(router.weight.dtype) @ router.weight.t()).sigmoid() + router.bias
    best = scores.topk(min(router.top_k + 1, scores.shape[1]), dim=-1).values
    if best.shape[1] == router.top_k or not len(best):
        return float("inf")
    return float((best[:, -2] - best[:, -1]).min())


def many_steps(corpus: str, cases: list[tuple[str, list[str]]]) -> list[Steps]:
    """`steps` for each (dtype, more) in `cases`; only rank 0 returns the weights."""
    results = [steps(corpus, dtype, more) for dtype, more in cases]
    if World.from_environment().rank == 0:
        return results
    return [(fields, {}, gap) for fields, _, gap in results]


def run_on_small_disk(corpus: str, runs: str, more: list[str]) -> int:
    """A run whose rank 1 can write no file larger than 50,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if World.from_environment().rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        return run(Path(corpus), Path(runs), *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sharded_model(replicate: int, expert: int) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model with 31 experts on this mesh, in which each block is an FSDP unit, and an optimizer with its state."""
    world, cpu = World.from_environment(), torch.device("cpu")
    device_mesh = mesh.make_mesh(mesh.resolve_degrees(world, PRIME_MODEL, replicate, "auto", expert), cpu)
    with mock.patch.object(fsdp, "ONE_UNIT_BYTES", 0):
        model = build_model(PRIME_MODEL, 40, 0, cpu, torch.float32, device_mesh)
    return model, make_optimizer(model, TrainConfig(steps=1))


def state_digest(model: Transformer, optimizer: torch.optim.Optimizer) -> str:
    """sha256 of weights, biases and the optimizer's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint_tensors(model, optimizer).items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(name.encode() + whole.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def save_random(folder: str, async_save: bool, replicate: int, expert: int) -> str:
    """Save a checkpoint of random numbers, which are the same on any mesh. Returns its digest."""
    model, optimizer = sharded_model(replicate, expert)
    for name, tensor in checkpoint_tensors(model, optimizer).items():
        generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        values = torch.empty(tensor.shape).uniform_(generator=generator)
        if isinstance(tensor, DTensor):
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            values = values[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
        fsdp.to_local(tensor).copy_(values)
    tokenizer = Path(folder) / "words"
    tokenizer.parent.mkdir(exist_ok=True)
    tokenizer.write_text("words")
    saver = Saver(
        Path(folder), checkpoint_tensors(model, optimizer), tokenizer, CheckpointConfig(async_save=async_save)
    )
    saver.save(1, {})
    saver.finish()
    saver.close()
    return state_digest(model, optimizer)


def load_all(folders: list[str], replicate: int, expert: int) -> list[str]:
    """Load the checkpoints of these folders on this mesh. Returns their digests."""
    model, optimizer = sharded_model(replicate, expert)
    digests = []
    for folder in folders:
        load_checkpoint(open_checkpoint(Path(folder) / "step-00000001"), model, optimizer)
        digests.append(state_digest(model, optimizer))
    return digests


def memory_of_saves(folder: str) -> dict[str, float]:
    """Bytes of memory that saves need besides the tensors: at their peak, and after many of them."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(key))

    def peak(call: Callable[[], object]) -> float:
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        call()
        return status("VmHWM") - before

    place = Path(folder)
    tokenizer = place / "words"
    tokenizer.write_text("words")
    memory: dict[str, float] = {}
    big = {f"w{i}": torch.ones(8_000_000) for i in range(6)}
    small = {"w": torch.ones(1_000_000)}
    synchronous = Saver(place / "a", big, tokenizer, CheckpointConfig())
    memory["waiting"] = peak(lambda: synchronous.save(1, {}))
    asynchronous = Saver(place / "b", big, tokenizer, CheckpointConfig(async_save=True))

    def save_asynchronously() -> None:
        asynchronous.save(1, {})
        asynchronous.finish()

    before = status("VmRSS")
    memory["staged"] = peak(save_asynchronously) + status("VmRSS") - before
    synchronous.close()
    asynchronous.close()
    many = Saver(place / "c", small, tokenizer, CheckpointConfig(async_save=True, keep=1))
    many.save(1, {}, wait=True)
    many.save(2, {})
    many.finish()
    before = status("VmRSS")
    for step in range(3, 53):
        many.save(step, {})
        many.wait_for_staging()
    many.finish()
    many.close()
    memory["after 50"] = status("VmRSS") - before
    return memory


def run_in_separate_folders(corpus: str, folder: str) -> str:
    """The error of a run whose ranks see different folders under the same path."""
    previous = Path.cwd()
    own_folder = Path(folder) / str(World.from_environment().rank)
    own_folder.mkdir(parents=True)
    os.chdir(own_folder)
    try:
        with mock.patch.object(startup, "VISIBILITY_TIMEOUT_S", 0.3):
            run(Path(corpus), Path("runs"))
    except UserError as error:
        return str(error)
    finally:
        os.chdir(previous)
    return "no error"
