"""A checkpoint into a model and its optimizer, on any mesh; or into a model for evaluation and generation."""

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
from parallel.experts import as_global_dtensor
from trainer import devices, machine
from trainer.checkpoint import block_io, layout
from trainer.checkpoint.folder import TOKENIZER, Checkpoint, newest_checkpoint, none_usable, resolve_checkpoint
from trainer.config import SECTION_TYPES, Config
from trainer.machine import dtype_name


def checkpoint_tensors(model: Transformer, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name: views of the live tensors, so that loading into them sets them."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        named[name] = as_global_dtensor(model, name, parameter.detach())
        for key, value in optimizer.state[parameter].items() if optimizer is not None else ():
            named[f"optim.{key}.{name}"] = as_global_dtensor(model, name, value) if value.ndim else value
    named.update({name: b for name, b in model.named_buffers()})
    return named


def load_checkpoint(
    checkpoint: Checkpoint, model: Transformer, optimizer: torch.optim.Optimizer | None = None, others: bool = True
) -> tuple[Checkpoint, list[str]]:
    """Fill model (and optimizer) in place from a checkpoint, or if it is damaged from `others` before it.

    On all ranks together. Returns the one that was verified, and why later ones were not, a line each. Raises
    UserError when there is none, or it is another model's.
    """
    targets = checkpoint_tensors(model, optimizer)
    skipped: list[str] = []
    at: Checkpoint | None = checkpoint
    while at is not None:
        why = None
        try:
            _fits(at, targets)
            block_io.read_small(at.path / TOKENIZER, at.manifest["files"][TOKENIZER])
            layout.read(at.path, at.manifest["files"], at.manifest["tensors"], targets)
        except UserError:
            raise
        except Exception as error:  # the other ranks must hear of it
            why = str(error) or type(error).__name__
        why = collectives.first_error(why)
        if why is None:
            return at, skipped
        skipped.append(f"{at.path.name}: {why}")
        found = newest_checkpoint(at.path.parent, at.step) if others and collectives.rank() == 0 else (None, [])
        at, more = collectives.broadcast(found)
        skipped += more
    raise UserError(none_usable(checkpoint.path.parent, skipped))


def _fits(checkpoint: Checkpoint, targets: Mapping[str, Tensor]) -> None:
    stored = checkpoint.manifest["tensors"]
    for name, tensor in targets.items():
        if name not in stored:
            what = "the optimizer's state" if name.startswith("optim.") else name
            raise UserError(f"{checkpoint.path}: {what} is not in it")
        shape = tuple(stored[name]["shape"])
        if shape != tuple(tensor.shape):
            raise UserError(f"{checkpoint.path}: {name} has shape {shape}, the model {tuple(tensor.shape)}")


def load_model(path: Path, requested: str = "cpu") -> tuple[Transformer, Tokenizer, Config]:
    """The model of a checkpoint (or of a run's newest) on one device, its tokenizer and its run's config.

    requested: `auto`, `cpu` or `cuda`. On a CPU it computes in fp32, on a GPU as `machine.inference_dtype` says.
    """
    found, passed_over = resolve_checkpoint(path)
    manifest = found.manifest
    config = Config(**{name: check(kind, name, manifest["config"][name]) for name, kind in SECTION_TYPES.items()})
    cpu = torch.device("cpu")
    model = build_model(config.model, manifest["vocab_size"], config.train.seed, cpu, torch.float32, None)
    found, more = load_checkpoint(found, model, others=found.path != path)
    for why in [*passed_over, *more]:
        print(f"passed over {why}", file=sys.stderr)
    tokenizer = Tokenizer(found.path / TOKENIZER)
    device = devices.device_with_room(requested, sum(p.numel() for p in model.parameters()))
    place(model, device, machine.inference_dtype(device))
    print(f"{found.path}: step {found.step}, on {device.type}, {dtype_name(model.compute_dtype)}", file=sys.stderr)
    return model, tokenizer, config


def place(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Let a model compute on a device in `dtype`. Its weights become that, but for the routers', as under FSDP."""
    routers = {p for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in routers:
            parameter.data = parameter.data.to(dtype)
    model.to(device)
    model.compute_dtype = dtype


def weights_digest(model: Transformer) -> str:
    """sha256 over all weights, for comparing runs bit by bit. Gathers one weight at a time."""
    total = hashlib.sha256()
    for name, tensor in checkpoint_tensors(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total.update(name.encode() + whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
