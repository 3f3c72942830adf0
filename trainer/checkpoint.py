"""Checkpoints: a folder of safetensors, a JSON manifest, and an atomic rename.

A checkpoint is the folder `checkpoints/step-00000400/`: tensors by name (weights, balance biases, `optim.exp_avg.NAME`
and so on) in their logical shapes, so that any number of ranks can load them; `tokenizer.model`; `manifest.json`. It is
written under another name by all ranks, flushed and read back, and renamed by rank 0: what bears the name is complete.
Every byte has a checksum, which is verified before it is used. No pickle is written or read.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.settings import UserError
from model.transformer import Transformer
from parallel import collectives
from parallel.experts import logical
from trainer import blocks, storage
from trainer.blocks import Damaged

FORMAT = 2
NAME, PARTIAL = re.compile(r"step-(\d{8})"), re.compile(r"\.(partial|old)-step-\d{8}(-[0-9a-f]+)?")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.model"
SEAL = b',\n"checksum": '  # the last key of a manifest: the crc32 of the bytes before this


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def tensors(model: Transformer, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name: views of the live tensors, so that loading into them sets them."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        named[name] = logical(model, name, parameter.detach())
        for key, value in optimizer.state[parameter].items() if optimizer is not None else ():
            named[f"optim.{key}.{name}"] = logical(model, name, value) if value.ndim else value
    named.update({name: b for name, b in model.named_buffers()})
    return named


def complete(folder: Path) -> list[Path]:
    """The folders of complete checkpoints in a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def newest(folder: Path, below: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in a folder (of a step `below` one) that looks whole, and why newer ones do not."""
    why: list[str] = []
    named = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    for path in sorted(named, reverse=True):
        if below is None or int(path.name.removeprefix("step-")) < below:
            try:
                return open_checkpoint(path), why
            except Damaged as error:
                why.append(f"{path.name}: {error}")
    return None, why


def open_checkpoint(path: Path) -> Checkpoint:
    """Manifest read, files there and of their sizes; their content is verified when it is read. Raises Damaged."""
    manifest = read_manifest(path)
    for name, record in manifest["files"].items():
        blocks.check_file(path / name, record)
    return Checkpoint(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises Damaged."""
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = json.loads(content)
    except FileNotFoundError:
        raise Damaged("half a checkpoint, it has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"manifest.json cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        written = manifest.get("format") if isinstance(manifest, dict) else None
        raise Damaged(f"format {written}, this version reads {FORMAT}")
    body, _, seal = content.rpartition(SEAL)
    if seal != f"{zlib.crc32(body)}\n}}\n".encode() or any(Path(name).name != name for name in manifest["files"]):
        raise Damaged("manifest.json is not what was written")
    return manifest


def write_manifest(path: Path, fields: Mapping[str, Any], table: str) -> None:
    """`manifest.json` into a folder, a key a line: the fields, the table of tensors, which is JSON already, a seal."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    body = ("{\n" + ",\n".join([*lines, f'"tensors": {table}'])).encode()
    blocks.write_small(path / MANIFEST, body + SEAL + f"{zlib.crc32(body)}\n}}\n".encode())


def find(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that a path means, itself or the newest of a run's folder, and why newer ones were passed over.

    Raises UserError.
    """
    if (path / MANIFEST).is_file():
        try:
            return open_checkpoint(path), []
        except Damaged as error:
            raise UserError(f"--checkpoint {path}: {error}") from None
    found, why = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        what = "no complete checkpoint in it" if path.is_dir() else "no such folder"
        what += f" ({'; '.join(why)})" if why else ""
        raise UserError(f"--checkpoint {path}: {what}; give a run folder, such as runs/tiny, or a checkpoint folder")
    return found, why


def load(
    checkpoint: Checkpoint, model: Transformer, optimizer: torch.optim.Optimizer | None = None, others: bool = True
) -> tuple[Checkpoint, list[str]]:
    """Fill model (and optimizer) in place from a checkpoint, or if it is damaged from `others` before it.

    On all ranks together. Returns the one that was verified, and why later ones were not, a line each. Raises
    UserError when there is none, or it is another model's.
    """
    targets = tensors(model, optimizer)
    skipped: list[str] = []
    at: Checkpoint | None = checkpoint
    while at is not None:
        why = None
        try:
            _fits(at, targets)
            blocks.read_small(at.path / TOKENIZER, at.manifest["files"][TOKENIZER])
            storage.read(at.path, at.manifest["files"], at.manifest["tensors"], targets)
        except UserError:
            raise
        except Exception as error:  # the other ranks must hear of it
            why = str(error) or type(error).__name__
        why = collectives.first_error(why)
        if why is None:
            return at, skipped
        skipped.append(f"{at.path.name}: {why}")
        found = newest(at.path.parent, at.step) if others and collectives.rank() == 0 else (None, [])
        at, more = collectives.broadcast(found)
        skipped += more
    raise UserError(none_usable(checkpoint.path.parent, skipped))


def none_usable(folder: Path, why: Sequence[str]) -> str:
    return (
        f"{folder}: no checkpoint there can be used ({'; '.join(why)}); move that folder away to start afresh, "
        "or choose another run.name="
    )


def _fits(checkpoint: Checkpoint, targets: Mapping[str, Tensor]) -> None:
    stored = checkpoint.manifest["tensors"]
    for name, tensor in targets.items():
        if name not in stored:
            what = "the optimizer's state" if name.startswith("optim.") else name
            raise UserError(f"{checkpoint.path}: {what} is not in it")
        shape = tuple(stored[name]["shape"])
        if shape != tuple(tensor.shape):
            raise UserError(f"{checkpoint.path}: {name} has shape {shape}, the model {tuple(tensor.shape)}")


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name."""
    blocks.flush(partial)
    if final.exists():  # the same step again, after a resume from an older one
        _drop(final)
    os.rename(partial, final)
    blocks.flush(final.parent)


def prune(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Drop all but the newest `keep` up to `step`, and those at multiples of keep_every.

    What is ahead of `step` stays, and does not count: the run went back behind it.
    """
    steps = [int(path.name.removeprefix("step-")) for path in complete(folder)]
    for old in [s for s in steps if s <= step][:-keep]:
        if not keep_every or old % keep_every:
            _drop(folder / f"step-{old:08d}")


def _drop(path: Path) -> None:
    """Take a checkpoint away: not complete any more from the first moment on."""
    aside = path.with_name(f".old-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed saves have left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def digest(model: Transformer) -> str:
    """sha256 over all weights, for comparing runs bit by bit. Gathers one weight at a time."""
    total = hashlib.sha256()
    for name, tensor in tensors(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total.update(name.encode() + whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
