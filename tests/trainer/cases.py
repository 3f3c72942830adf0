"""Runs of seconds for the pool's processes, and for this one."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from model.moe import Router
from parallel import fsdp, mesh
from parallel.mesh import World
from trainer.checkpoint import complete, digest, tensors
from trainer.config import Config, read_config
from trainer.faults import StopFlag
from trainer.loop import train
from trainer.metrics import Reporter, read_lines
from trainer.optimizer import LossScale, make_optimizer
from trainer.start import Run, degrees, open_corpus
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
    from trainer.evaluate import load_model
    from trainer.hub_import import beginning

    world, cpu = World.from_environment(), torch.device("cpu")
    _, tokenizer, c = load_model(Path(run))
    layout = mesh.make_mesh(mesh.degrees(world, c.model, 1, "auto", expert), cpu)
    done = []
    for place in places:
        model = fsdp.build(c.model, tokenizer.vocab_size, 5, cpu, torch.float32, layout)
        beginning(place, c.model, tokenizer.vocab_size).fill(model)
        done.append(digest(model))
    return done


def losses(folder: Path) -> list[float]:
    """Training losses of a run by step, which must count up from 1."""
    lines = [x for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
    assert [x["step"] for x in lines] == list(range(1, len(lines) + 1))
    return [x["loss"] for x in lines]


def last_digest(folder: Path) -> str:
    """Of weights and biases of a run's newest checkpoint."""
    from trainer.evaluate import load_model

    return digest(load_model(complete(folder / "checkpoints")[-1])[0])


def fresh(corpus: Path, *more: str) -> Run:
    """A run before its first step, in this process, without a folder."""
    world, cpu = World(), torch.device("cpu")
    c = config(corpus, Path("none"), *more)
    opened, tokenizer, loader, steps = open_corpus(c, world, cpu)
    model = fsdp.build(c.model, tokenizer.vocab_size, c.train.seed, cpu, torch.float32, None)
    quiet = Reporter(Path("none"), c.log, "none", False)
    model.train()
    return Run(
        c, world, cpu, torch.float32, opened, tokenizer, loader, steps, model, make_optimizer(model, c.train),
        degrees(c, world), LossScale.of(torch.float32), quiet, StopFlag(),
    )  # fmt: skip


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
        model = fsdp.build(
            c.model, tokenizer.vocab_size, c.train.seed, cpu, compute, mesh.make_mesh(d, cpu), c.parallel.overlap,
            c.train.recompute, c.train.compile,
        )  # fmt: skip
        quiet = Reporter(Path("none"), c.log, "none", False)
        run = Run(
            c, world, cpu, compute, opened, tokenizer, loader, 5, model, make_optimizer(model, c.train), d,
            LossScale.of(compute), quiet, StopFlag(),
        )  # fmt: skip
        gaps = [float("inf")]
        for module in model.modules():
            if isinstance(module, Router) and world.size == 1:
                module.register_forward_hook(lambda router, inputs, _: gaps.append(narrowest(router, *inputs)))
        model.train()
        told = [train_step(run, loader.step(step)).fields for step in range(5)]
        whole = {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in tensors(model).items()}
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
