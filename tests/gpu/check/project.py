"""Everything that the check uses of the project's internals. If they change, only this file must be adapted."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import parallel.build
from model.grouped import grouped_matmul
from model.initial_values import Constant, initial_values
from model.loss import IGNORE, Loss, linear_cross_entropy
from model.precision import weights_unchanged
from model.random import dropout, fold, normal, random_bytes, sequence_keys, site_keys
from model.transformer import Transformer
from parallel import collectives, fsdp, rendezvous
from parallel import gradients as reduction
from parallel import mesh as meshes
from parallel.mesh import Degrees, Mesh, World
from trainer import devices, machine
from trainer import main as trainer_main
from trainer.config import Config, read_config
from trainer.devices import peak_flops
from trainer.optimizer import make_optimizer

__all__ = [
    "IGNORE",
    "Config",
    "Loss",
    "Mesh",
    "Transformer",
    "dropout",
    "fold",
    "grouped_matmul",
    "linear_cross_entropy",
    "make_optimizer",
    "normal",
    "peak_flops",
    "random_bytes",
    "read_config",
    "sequence_keys",
    "weights_unchanged",
]

ROOT = Path(__file__).resolve().parents[3]
TINY, SCOUT = str(ROOT / "launch/tiny.yaml"), str(ROOT / "launch/scout.yaml")


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B sequences of S tokens."""

    tokens: Tensor  # (B, S)
    targets: Tensor  # (B, S)
    keys: Tensor  # (B,): keys of the random numbers
    positions: Tensor | None = None  # (B, S)
    documents: Tensor | None = None  # (B, S)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t if t is None else t.to(device) for t in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepNumbers:
    """The results of forward and backward of one micro-batch, on the CPU."""

    loss: float  # sum over the targets
    gradients: dict[str, Tensor]  # fp32
    loads: Tensor  # (layers, E)


def build_model(
    config: Config,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None = None,
    recompute: str | None = None,
    compile: bool | None = None,
    exact_weights: bool = True,
) -> Transformer:
    """The model of a run, in training mode. `recompute` and `compile` are those of the config if they are None.

    exact_weights=False draws weights on the device instead of the run's own weights: a CPU needs many seconds to draw
    those of a large model.
    """
    if recompute is None:
        recompute = config.train.recompute
    if compile is None:
        compile, _ = machine.choose_compile(config.train.compile, device)

    drawing: AbstractContextManager[Any] = nullcontext()
    if not exact_weights:
        drawing = patch.object(Transformer, "init_weights", _draw_on_device)
    with drawing:
        model = parallel.build.build_model(
            config.model,
            vocab_size,
            config.train.seed,
            device,
            dtype,
            mesh,
            config.parallel.overlap,
            recompute,
            compile,
        )
    model.train()
    return model


@torch.no_grad()
def _draw_on_device(model: Transformer, *_: Any) -> None:
    """Takes the place of Transformer.init_weights."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        values, part = initial_values(model, name), fsdp.to_local(parameter)
        if isinstance(values, Constant):
            part.fill_(values.value)
        else:
            part.normal_(0, values.std)
    for buffer in model.buffers():
        buffer.zero_()


def use_loss(model: Transformer, loss: Loss | None) -> None:
    """Compute the loss with another function; None keeps the model's own."""
    if loss is not None:
        model.head.loss = loss


def liger_loss(device: torch.device) -> tuple[Loss | None, str | None]:
    """Liger's loss and None; or None and the reason why it cannot be used."""
    return machine.choose_loss(True, device)


def forward(model: Transformer, config: Config, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss that training differentiates, as a sum over the targets; and the experts' loads (layers, E)."""
    needs_random_numbers = config.model.dropout > 0 or config.model.noisy_top_k
    keys = site_keys(batch.keys, config.model.n_layers) if needs_random_numbers else None
    output = model(batch.tokens, batch.targets, batch.positions, batch.documents, keys)
    assert output.loss is not None
    return output.loss + output.penalty, output.loads


def step_numbers(model: Transformer, config: Config, batch: Batch) -> StepNumbers:
    """Forward and backward of one micro-batch. Gradients are those of the loss divided by the number of tokens."""
    loss, loads = forward(model, config, batch)
    (loss / batch.tokens.numel()).backward()
    return StepNumbers(float(loss.detach()), gradients(model), loads.cpu())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """All gradients in full, in fp32 on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            full = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name] = full.detach().float().cpu()
    return found


def set_gradient_sync(model: Transformer, enabled: bool) -> None:
    """Whether the next backward reduces gradients over the ranks."""
    fsdp.set_gradient_sync(model, enabled)


def finish_step(
    model: Transformer, optimizer: torch.optim.Optimizer, config: Config, loss: Tensor
) -> tuple[float, float]:
    """The part of a step after the backward: one message for loss and norm, the gradient clipping, the optimizer.

    `loss` is the sum of the mean losses of this rank's micro-batches. Returns its mean over all ranks, and the norm.
    """
    reduction.sum_replicated(model)
    parts = reduction.local_gradients(model)
    square = reduction.sum_of_squares(model, config.parallel.replicate)
    total_square, total_loss, ranks = collectives.sum_over_ranks(
        square.to(loss.device), loss, torch.ones((), dtype=torch.float64, device=loss.device)
    )
    norm = float(total_square) ** 0.5
    reduction.scale(parts, min(1.0, config.train.clip / (norm + 1e-6)))
    optimizer.step()
    optimizer.zero_grad()
    return float(total_loss / ranks), norm


def largest_over_ranks(value: float, device: torch.device) -> float:
    number = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return float(number)


def train(arguments: Sequence[str]) -> int:
    """Run trainer.main in this process. Returns its exit code."""
    return trainer_main.main(arguments)


@contextmanager
def one_rank_world(device: torch.device, port: int = 29511) -> Iterator[Mesh]:
    """A world of one rank with the meshes of FSDP2 and of the experts, over NCCL on CUDA.

    The trainer does not apply FSDP in a run of one process. Here it is applied, so that one GPU runs the same code as
    several.
    """
    cuda = device.type == "cuda"
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if cuda else "gloo", rank=0, world_size=1, device_id=device if cuda else None
    )
    try:
        dense = init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
        yield Mesh(Degrees(1, 1, 1), dense, dense._unflatten(0, (1, 1), ("expert_shard", "expert")))
    finally:
        dist.destroy_process_group()


@contextmanager
def world_of_ranks(config: Config) -> Iterator[tuple[World, torch.device, Degrees, Mesh | None]]:
    """This process's place among those that torchrun started, connected to them, with the meshes of `config`."""
    world = World.from_environment()
    device = devices.choose_device(config.run.device, world)
    p = config.parallel
    degrees = meshes.resolve_degrees(world, config.model, p.replicate, p.shard, p.expert)
    rendezvous.connect(world, device, 120)
    try:
        yield world, device, degrees, meshes.make_mesh(degrees, device)
    finally:
        rendezvous.disconnect()


def expert_degree(config: Config, ranks: int, expert: int | str) -> int:
    """The degree that parallel.expert=`expert` means for `ranks` processes on one machine. Raises MeshError."""
    world = World(0, ranks, 0, ranks)
    return meshes.resolve_degrees(world, config.model, 1, "auto", expert).expert


def flops(config: Config, vocab_size: int, rows: int) -> float:
    """Operations of the forward and backward of a micro-batch of `rows` rows."""
    return float(rows * config.data.seq_len * config.model.flops_per_token(vocab_size, config.data.seq_len))


@dataclass(frozen=True)
class CommandResult:
    """The result of a command of the project."""

    code: int
    stdout: str
    stderr: str

    @property
    def tail(self) -> str:
        """The last lines of stderr if the command failed, else "": for the report."""
        return "" if self.code == 0 else " ".join(self.stderr.strip()[-400:].splitlines()[-2:])


def command(module: str, *arguments: str, log: Path, timeout: float) -> CommandResult:
    """Run `python -m module arguments`, and write its output to `log`. It is killed after `timeout` seconds."""
    path = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        stderr += f"\nkilled after {timeout:.0f} s"
    log.write_text(f"{stdout}\n{stderr}", encoding="utf-8")
    return CommandResult(process.returncode, stdout, stderr)


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind ("train", "eval") of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


def planned_gib(dry_run: str) -> float | None:
    """The memory of a rank that --dry-run estimates, in GiB; None if its output has no such line."""
    found = re.search(r"^memory +about ([\d.]+) GiB", dry_run, re.MULTILINE)
    return float(found[1]) if found else None


def config_arguments(path: str, settings: Sequence[str]) -> list[str]:
    return ["--config", path, *settings]
