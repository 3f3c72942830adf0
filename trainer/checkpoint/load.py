"""Loads a checkpoint into a model and its optimizer, on any mesh, or into a model for evaluation and generation."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.settings import UserError, check
from data.tokenizer import Tokenizer
from model.moe import Router
from model.transformer import Transformer
from parallel import collectives
from parallel.build import build_model
from parallel.experts import parameter_as_global_dtensor
from trainer import devices, machine
from trainer.checkpoint import block_io, layout
from trainer.checkpoint.folder import TOKENIZER, Checkpoint, newest_checkpoint, no_usable_checkpoint, resolve_checkpoint
from trainer.config import SECTION_TYPES, Config
from trainer.machine import dtype_name


def checkpoint_tensors(model: Transformer, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, as views of the live tensors: to load into them sets the model."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        named[name] = parameter_as_global_dtensor(model, name, parameter.detach())
        for key, value in optimizer.state[parameter].items() if optimizer is not None else ():
            named[f"optim.{key}.{name}"] = parameter_as_global_dtensor(model, name, value) if value.ndim else value
    named.update({name: b for name, b in model.named_buffers()})
    return named


def load_checkpoint(
    checkpoint: Checkpoint, model: Transformer, optimizer: torch.optim.Optimizer | None = None, others: bool = True
) -> tuple[Checkpoint, list[str]]:
    """Fill model (and optimizer) in place from a checkpoint. If it is damaged and `others`, try older ones.

    Called on all ranks together. Returns the checkpoint that was loaded, and for each newer one a line with the reason
    why it was skipped. Raises UserError if none can be used, or if the checkpoint is one of another model.
    """
    targets = checkpoint_tensors(model, optimizer)
    skipped_checkpoints: list[str] = []
    current: Checkpoint | None = checkpoint
    while current is not None:
        problem = None
        try:
            _check_shapes(current, targets)
            block_io.read_bytes(current.path / TOKENIZER, current.manifest["files"][TOKENIZER])
            layout.read(current.path, current.manifest["files"], current.manifest["tensors"], targets)
        except UserError:
            raise
        except Exception as error:  # all ranks must agree on it
            problem = str(error) or type(error).__name__
        problem = collectives.first_error(problem)
        if problem is None:
            return current, skipped_checkpoints
        skipped_checkpoints.append(f"{current.path.name}: {problem}")
        older: tuple[Checkpoint | None, list[str]] = (None, [])
        if others and collectives.rank() == 0:
            older = newest_checkpoint(current.path.parent, current.step)
        current, more = collectives.broadcast(older)
        skipped_checkpoints += more
    raise UserError(no_usable_checkpoint(checkpoint.path.parent, skipped_checkpoints))


def _check_shapes(checkpoint: Checkpoint, targets: Mapping[str, Tensor]) -> None:
    """Raises UserError if a tensor is missing, or has another shape than the model's."""
    stored = checkpoint.manifest["tensors"]
    for name, tensor in targets.items():
        if name not in stored:
            missing = "the optimizer's state" if name.startswith("optim.") else name
            raise UserError(f"{checkpoint.path}: the checkpoint does not contain {missing}")
        shape = tuple(stored[name]["shape"])
        if shape != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint.path}: {name} has shape {shape} in the checkpoint, {tuple(tensor.shape)} in the model"
            )


def load_model(path: Path, requested: str = "cpu") -> tuple[Transformer, Tokenizer, Config]:
    """The model of a checkpoint (or of a run's newest one) on one device, its tokenizer, and its run's config.

    requested: the device, `auto`, `cpu` or `cuda`. On a CPU the model computes in fp32, on a GPU in
    `machine.inference_dtype`. Logs the checkpoint, and each newer one that was skipped, on stderr. Raises UserError.
    """
    found, skipped_checkpoints = resolve_checkpoint(path)
    manifest = found.manifest
    sections = {name: check(kind, name, manifest["config"][name]) for name, kind in SECTION_TYPES.items()}
    config = Config(**sections)
    cpu = torch.device("cpu")
    model = build_model(config.model, manifest["vocab_size"], config.train.seed, cpu, torch.float32, None)
    found, more = load_checkpoint(found, model, others=found.path != path)
    for reason in [*skipped_checkpoints, *more]:
        print(f"skipped checkpoint {reason}", file=sys.stderr)
    tokenizer = Tokenizer(found.path / TOKENIZER)
    device = devices.device_with_room(requested, sum(p.numel() for p in model.parameters()))
    place(model, device, machine.inference_dtype(device))
    print(f"{found.path}: step {found.step}, on {device.type}, {dtype_name(model.compute_dtype)}", file=sys.stderr)
    return model, tokenizer, config


def place(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to a device, where it computes in `dtype`. As under FSDP, the routers' weights stay in fp32."""
    routers = {p for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in routers:
            parameter.data = parameter.data.to(dtype)
    model.to(device)
    model.compute_dtype = dtype


def weights_digest(model: Transformer) -> str:
    """sha256 over all weights, to compare runs bit by bit. Gathers one weight at a time."""
    total = hashlib.sha256()
    for name, tensor in checkpoint_tensors(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total.update(name.encode() + whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
