"""Checkpoints: safetensors by torch.distributed.checkpoint, a JSON manifest, and an atomic rename.

A checkpoint is the folder `checkpoints/step-00000400/`: tensors by name (weights, balance biases, `optim.exp_avg.NAME`
and so on) in their logical shapes, so that any number of ranks can load them; `tokenizer.model`; `manifest.json`.
It is written under another name, flushed, and renamed when all ranks are done: what bears the name is complete.
No pickle is written or read.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from data.config import UserError
from model.transformer import Transformer
from parallel.experts import logical

FORMAT = 1
NAME = re.compile(r"step-(\d{8})")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.model"


def tensors(model: Transformer, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name: views of the live tensors, so that loading into them sets them."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        named[name] = logical(model, name, parameter.detach())
        for key, value in optimizer.state[parameter].items() if optimizer is not None else ():
            named[f"optim.{key}.{name}"] = logical(model, name, value) if value.ndim else value
    named.update({name: b for name, b in model.named_buffers()})
    return named


def save(
    folder: Path,
    step: int,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    manifest: Mapping[str, Any],
    tokenizer: Path,
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNNNN` from all ranks, and drop all but the newest `keep`. Returns its path."""
    final, partial = folder / f"step-{step:08d}", folder / f".partial-step-{step:08d}"
    first = _rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    writer = HuggingFaceStorageWriter(path=str(partial), save_distributed=True)
    with _alone_is_fine():
        dcp.save(tensors(model, optimizer), storage_writer=writer, no_dist=not dist.is_initialized())
    if first:
        shutil.copyfile(tokenizer, partial / TOKENIZER)
        (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, **manifest}, indent=1))
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        if final.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(final)
        os.rename(partial, final)
        _flush(folder)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier()
    return final


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def find(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run folder. Raises UserError."""
    if (path / MANIFEST).is_file() and NAME.fullmatch(path.name):
        return path
    found = complete(path / "checkpoints") or complete(path)
    if not found:
        what = "no complete checkpoint in it" if path.is_dir() else "no such folder"
        raise UserError(f"--checkpoint {path}: {what}; give a run folder, such as runs/tiny, or a checkpoint folder")
    return found[-1]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint says of itself. Raises UserError when it is unreadable or of another format."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / MANIFEST}: cannot be read ({error}); remove this checkpoint") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{checkpoint}: format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def load(checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill model (and optimizer) in place, from a checkpoint of any number of ranks. Raises UserError."""
    targets = tensors(model, optimizer)
    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        stored = reader.read_metadata().state_dict_metadata
        for name, tensor in targets.items():
            there = getattr(stored.get(name), "size", None)
            if there is None or tuple(there) != tuple(tensor.shape):
                shape = None if there is None else tuple(there)
                raise UserError(f"{checkpoint}: {name} has shape {shape}, the model {tuple(tensor.shape)}")
        with _alone_is_fine():
            dcp.load(targets, storage_reader=reader, no_dist=not dist.is_initialized())
    except UserError:
        raise
    except Exception as error:  # safetensors and dcp raise many kinds for a damaged file
        why = str(error).splitlines()[0]
        raise UserError(f"{checkpoint}: cannot be read ({why}); remove it to use the one before") from error


def digest(model: Transformer) -> str:
    """sha256 over all weights, for comparing runs bit by bit. Gathers one weight at a time."""
    total = hashlib.sha256()
    for name, tensor in tensors(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total.update(name.encode() + whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """dcp warns whenever there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
