"""Runs of seconds for the pool's processes, and for this one."""

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
from model.config import ModelConfig
from model.moe import Router
from model.transformer import Transformer
from parallel import fsdp, mesh
from parallel.build import build_model
from parallel.mesh import World
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

MODEL = ["model.dim=16", "model.n_layers=2", "model.n_heads=2", "model.expert_dim=16", "model.n_experts=5"]
MODEL += ["model.nope_every=2", "model.max_seq_len=512", "model.balance_rate=0.01"]
TRAIN = ["train.steps=20", "train.global_batch_size=6", "train.micro_batch_size=2", "train.max_lr=3e-3"]
TRAIN += ["train.warmup_steps=5", "train.dtype=float32", "train.seed=1"]
QUIET = ["log.wandb=disabled", "sample.every=0", "sample.max_new_tokens=8", "eval.every=0", "eval.final=none"]


def words(corpus: Path, runs: Path, *more: str) -> list[str]:
    """The settings of a run of seconds, as a user would type them."""
    data = [f"data.dir={corpus}", "data.stories=1200", "data.vocab_size=320", "data.validation=0.05"]
    data += ["data.shard_tokens=40000", "data.seq_len=32"]
    return [*data, *MODEL, *TRAIN, *QUIET, f"run.dir={runs}", "run.threads=1", *more]


def config(corpus: Path, runs: Path, *more: str) -> Config:
    return read_config(None, words(corpus, runs, *more))


def run(corpus: Path, runs: Path, *more: str) -> int:
    return train(config(corpus, runs, *more))


def run_words(corpus: str, runs: str, more: list[str]) -> int:
    """`run` for the pool."""
    return run(Path(corpus), Path(runs), *more)


def deterministic_run(corpus: str, runs: str, more: list[str]) -> tuple[bool, str]:
    """`run` with run.deterministic, whose switch is turned off again: whether it was on, and cuBLAS's setting."""
    try:
        assert run(Path(corpus), Path(runs), "run.deterministic=true", *more) == 0
        return torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def begun(places: list[str], run: str, expert: int) -> list[str]:
    """Digests of models on these processes that begin with the weights of folders or checkpoints."""
    from trainer.checkpoint.load import load_model
    from trainer.hub.importer import initial_weights

    world, cpu = World.from_environment(), torch.device("cpu")
    _, tokenizer, c = load_model(Path(run))
    layout = mesh.make_mesh(mesh.resolve_degrees(world, c.model, 1, "auto", expert), cpu)
    done = []
    for place in places:
        model = build_model(c.model, tokenizer.vocab_size, 5, cpu, torch.float32, layout)
        initial_weights(place, c.model, tokenizer.vocab_size).fill(model)
        done.append(weights_digest(model))
    return done


def one_is_blind(corpus: str, place: str, more: list[str]) -> str:
    """What each rank says of a folder to begin with that rank 1 does not have."""
    where = place + "-gone" * (World.from_environment().rank == 1)
    c = config(Path(corpus), Path("none"), *more, f"train.init_from={where}")
    try:
        load_initial_weights(c, Corpus.open(corpus).tokenizer())
    except UserError as error:
        return str(error)
    return "nothing"


def losses(folder: Path) -> list[float]:
    """Training losses of a run by step, which must count up from 1."""
    lines = [x for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
    assert [x["step"] for x in lines] == list(range(1, len(lines) + 1))
    return [x["loss"] for x in lines]


def last_digest(folder: Path) -> str:
    """Of weights and biases of a run's newest checkpoint."""
    from trainer.checkpoint.load import load_model

    return weights_digest(load_model(complete_checkpoints(folder / "checkpoints")[-1])[0])


def fresh(corpus: Path, *more: str) -> Run:
    """A run before its first step, in this process, without a folder."""
    world, cpu = World(), torch.device("cpu")
    c = config(corpus, Path("none"), *more)
    opened, tokenizer, loader, steps = open_corpus(c, world, cpu)
    model = build_model(c.model, tokenizer.vocab_size, c.train.seed, cpu, torch.float32, None)
    quiet = Reporter(Path("none"), c.log, "none", False)
    model.train()
    return Run(
        config=c,
        world=world,
        device=cpu,
        dtype=torch.float32,
        degrees=degrees(c, world),
        corpus=opened,
        tokenizer=tokenizer,
        loader=loader,
        steps=steps,
        model=model,
        optimizer=make_optimizer(model, c.train),
        scale=LossScale.of(torch.float32),
        reporter=quiet,
        stop=StopFlag(),
        watchdog=Watchdog(),
    )


Steps = tuple[list[dict[str, Any]], dict[str, np.ndarray], float]


def steps(corpus: str, dtype: str, more: list[str]) -> Steps:
    """Five optimizer steps without a run folder, 12 rows each in two micro-batches.

    Returns what each says, the weights, and the smallest distance between an expert that was chosen and one that was
    not: rounding may turn near ties, so that layouts can be compared only where there was none.
    """
    world, cpu, compute = World.from_environment(), torch.device("cpu"), getattr(torch, dtype)
    size = -(-12 // (2 * world.size))
    settings = ["train.steps=5", "train.global_batch_size=12", f"train.micro_batch_size={size}", "model.dropout=0.1"]
    c = config(Path(corpus), Path("none"), *settings, "train.clip=0.3", "train.warmup_steps=2", *more)
    torch.set_default_dtype(torch.float64 if compute == torch.float64 else torch.float32)
    try:
        opened, tokenizer, loader, _ = open_corpus(c, world, cpu)
        d = degrees(c, world)
        model = build_model(
            c.model,
            tokenizer.vocab_size,
            c.train.seed,
            cpu,
            compute,
            mesh.make_mesh(d, cpu),
            c.parallel.overlap,
            c.train.recompute,
            c.train.compile is True,
        )
        quiet = Reporter(Path("none"), c.log, "none", False)
        run = Run(
            config=c,
            world=world,
            device=cpu,
            dtype=compute,
            degrees=d,
            corpus=opened,
            tokenizer=tokenizer,
            loader=loader,
            steps=5,
            model=model,
            optimizer=make_optimizer(model, c.train),
            scale=LossScale.of(compute),
            reporter=quiet,
            stop=StopFlag(),
            watchdog=Watchdog(),
        )
        gaps = [float("inf")]
        for module in model.modules():
            if isinstance(module, Router) and world.size == 1:
                module.register_forward_hook(lambda router, inputs, _: gaps.append(narrowest(router, *inputs)))
        model.train()
        told = [train_step(run, loader.step(step)).fields for step in range(5)]
        whole = {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in checkpoint_tensors(model).items()}
        return told, {k: t.numpy() for k, t in whole.items()}, min(gaps)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def narrowest(router: Router, x: torch.Tensor, real: torch.Tensor, *_: object) -> float:
    """How far the last expert that was chosen is from the next, for the token where it is nearest."""
    scores = (x[real].to(router.weight.dtype) @ router.weight.t()).sigmoid() + router.bias
    best = scores.topk(min(router.top_k + 1, scores.shape[1]), dim=-1).values
    if best.shape[1] == router.top_k or not len(best):
        return float("inf")
    return float((best[:, -2] - best[:, -1]).min())


def many_steps(corpus: str, cases: list[tuple[str, list[str]]]) -> list[Steps]:
    """`steps` for each (dtype, more) of a list; only rank 0 sends the weights back."""
    done = [steps(corpus, dtype, more) for dtype, more in cases]
    return done if World.from_environment().rank == 0 else [(told, {}, gap) for told, _, gap in done]


def limited(corpus: str, runs: str, more: list[str]) -> int:
    """A run whose rank 1 may write files of 50,000 bytes only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if World.from_environment().rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        return run(Path(corpus), Path(runs), *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


MESHED = ModelConfig(dim=24, n_layers=2, n_heads=2, expert_dim=12, n_experts=31, moe_every=2, max_seq_len=32)


def meshed(replicate: int, expert: int) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model on this mesh, each expert and block a unit of its own, and an optimizer with a state."""
    world, cpu = World.from_environment(), torch.device("cpu")
    layout = mesh.make_mesh(mesh.resolve_degrees(world, MESHED, replicate, "auto", expert), cpu)
    with mock.patch.object(fsdp, "ONE_UNIT_BYTES", 0):
        model = build_model(MESHED, 40, 0, cpu, torch.float32, layout)
    return model, make_optimizer(model, TrainConfig(steps=1))


def everything(model: Transformer, optimizer: torch.optim.Optimizer) -> str:
    """sha256 of weights, biases and the optimizer's state."""
    total = hashlib.sha256()
    for name, t in sorted(checkpoint_tensors(model, optimizer).items()):
        total.update(name.encode() + (t.full_tensor() if isinstance(t, DTensor) else t).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def save_random(folder: str, beside: bool, replicate: int, expert: int) -> str:
    """A checkpoint of numbers that differ everywhere, the same on any mesh."""
    model, optimizer = meshed(replicate, expert)
    for name, t in checkpoint_tensors(model, optimizer).items():
        whole = torch.empty(t.shape).uniform_(generator=torch.Generator().manual_seed(len(name) + sum(map(ord, name))))
        if isinstance(t, DTensor):
            shape, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
            whole = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        fsdp.to_local(t).copy_(whole)
    tokenizer = Path(folder) / "words"
    tokenizer.parent.mkdir(exist_ok=True)
    tokenizer.write_text("words")
    saver = Saver(Path(folder), checkpoint_tensors(model, optimizer), tokenizer, CheckpointConfig(async_save=beside))
    saver.save(1, {})
    saver.finish()
    saver.close()
    return everything(model, optimizer)


def load_all(folders: list[str], replicate: int, expert: int) -> list[str]:
    """What is in the checkpoints of these folders, as this mesh sees it."""
    model, optimizer = meshed(replicate, expert)
    found = []
    for folder in folders:
        load_checkpoint(open_checkpoint(Path(folder) / "step-00000001"), model, optimizer)
        found.append(everything(model, optimizer))
    return found


def memory_of_saves(folder: str) -> dict[str, float]:
    """Bytes above the tensors' that saves take at most, and that stay after many."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(key))

    def most(call: Callable[[], object]) -> float:
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        call()
        return status("VmHWM") - before

    place = Path(folder)
    (place / "words").write_text("words")
    found: dict[str, float] = {}
    big, small = {f"w{i}": torch.ones(8_000_000) for i in range(6)}, {"w": torch.ones(1_000_000)}
    waits = Saver(place / "a", big, place / "words", CheckpointConfig())
    found["waiting"] = most(lambda: waits.save(1, {}))
    beside = Saver(place / "b", big, place / "words", CheckpointConfig(async_save=True))

    def staged() -> None:
        beside.save(1, {})
        beside.finish()

    before = status("VmRSS")
    found["staged"] = most(staged) + status("VmRSS") - before
    for each in (waits, beside):
        each.close()
    many = Saver(place / "c", small, place / "words", CheckpointConfig(async_save=True, keep=1))
    many.save(1, {}, wait=True)
    many.save(2, {})
    many.finish()
    before = status("VmRSS")
    for step in range(3, 53):
        many.save(step, {})
        many.wait_for_staging()
    many.finish()
    many.close()
    found["after 50"] = status("VmRSS") - before
    return found


def apart(corpus: str, folder: str) -> str:
    """What a run says whose ranks have folders of their own under the same name."""
    here, rank = Path.cwd(), World.from_environment().rank
    place = Path(folder) / str(rank)
    place.mkdir(parents=True)
    os.chdir(place)
    try:
        with mock.patch.object(startup, "VISIBILITY_TIMEOUT_S", 0.3):
            run(Path(corpus), Path("runs"))
    except UserError as error:
        return str(error)
    finally:
        os.chdir(here)
    return "no error"
