"""Checkpoints: a folder of safetensors, a JSON manifest, and an atomic rename.

A checkpoint is the folder `checkpoints/step-00000400/`: tensors by name (weights, balance biases, `optim.exp_avg.NAME`
and so on) in their logical shapes, so that any number of ranks can load them; `tokenizer.model`; `manifest.json`. It is
written under another name by all ranks, flushed and read back, and renamed by rank 0: what bears the name is complete.
Every byte has a checksum, which is verified before it is used. No pickle is written or read.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.settings import UserError
from trainer.checkpoint import block_io
from trainer.checkpoint.block_io import Damaged

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


def complete_checkpoints(folder: Path) -> list[Path]:
    """The folders of complete checkpoints in a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def newest_checkpoint(folder: Path, below: int | None = None) -> tuple[Checkpoint | None, list[str]]:
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
        block_io.check_file(path / name, record)
    return Checkpoint(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises Damaged."""
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = json.loads(content)
    except FileNotFoundError:
        raise Damaged("incomplete, manifest.json is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"manifest.json cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        written = manifest.get("format") if isinstance(manifest, dict) else None
        raise Damaged(f"has checkpoint format {written}, but this version reads format {FORMAT}")
    body, _, seal = content.rpartition(SEAL)
    if seal != f"{zlib.crc32(body)}\n}}\n".encode() or any(Path(name).name != name for name in manifest["files"]):
        raise Damaged("manifest.json is damaged (it does not match its checksum)")
    return manifest


def write_manifest(path: Path, fields: Mapping[str, Any], table: str) -> None:
    """`manifest.json` into a folder, a key a line: the fields, the table of tensors, which is JSON already, a seal."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    body = ("{\n" + ",\n".join([*lines, f'"tensors": {table}'])).encode()
    block_io.write_small(path / MANIFEST, body + SEAL + f"{zlib.crc32(body)}\n}}\n".encode())


def resolve_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that a path means, itself or the newest of a run's folder, and why newer ones were passed over.

    Raises UserError.
    """
    if (path / MANIFEST).is_file():
        try:
            return open_checkpoint(path), []
        except Damaged as error:
            raise UserError(f"--checkpoint {path}: {error}") from None
    found, why = newest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        what = "no complete checkpoint in this folder" if path.is_dir() else "no such folder"
        what += f" ({'; '.join(why)})" if why else ""
        raise UserError(f"--checkpoint {path}: {what}; give a run folder, such as runs/tiny, or a checkpoint folder")
    return found, why


def none_usable(folder: Path, why: Sequence[str]) -> str:
    return (
        f"{folder}: no checkpoint in this folder can be used ({'; '.join(why)}); "
        "move the folder away to start again at step 0, or choose another run.name="
    )


def publish_checkpoint(partial: Path, final: Path) -> None:
    """Give a finished folder its name."""
    block_io.flush(partial)
    if final.exists():  # the same step again, after a resume from an older one
        _drop(final)
    os.rename(partial, final)
    block_io.flush(final.parent)


def prune_checkpoints(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Drop all but the newest `keep` up to `step`, and those at multiples of keep_every.

    What is ahead of `step` stays, and does not count: the run went back behind it.
    """
    steps = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder)]
    for old in [s for s in steps if s <= step][:-keep]:
        if not keep_every or old % keep_every:
            _drop(folder / f"step-{old:08d}")


def _drop(path: Path) -> None:
    """Take a checkpoint away: not complete any more from the first moment on."""
    aside = path.with_name(f".old-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what killed saves have left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
