"""The folder of a checkpoint: safetensors, a JSON manifest, and an atomic rename.

A checkpoint is a folder such as `checkpoints/step-00000400/`. It holds `manifest.json`, `tokenizer.model`, and the
tensors by name (weights, balance biases, `optim.KEY.PARAMETER`) in their global shapes, so that any number of
ranks can load them. All ranks write it under another name, flush it and read it back; then rank 0 renames it. So a
folder that has the name of a checkpoint is complete. A checksum covers every byte, and is verified before the byte is
used. No pickle is written or read.
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
NAME = re.compile(r"step-(\d{8})")
UNFINISHED = re.compile(r"\.(partial|old)-step-\d{8}(-[0-9a-f]+)?")  # being written, or being removed
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.model"
CHECKSUM_KEY = b',\n"checksum": '  # the last key of a manifest: the crc32 of the bytes before this


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and its manifest."""

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
    """The newest usable checkpoint in a folder (before step `below`), and why each newer one was skipped.

    Usable means that its manifest is intact and that its files exist with their sizes; their content is not read yet.
    """
    skipped_checkpoints: list[str] = []
    paths = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    for path in sorted(paths, reverse=True):
        if below is None or int(path.name.removeprefix("step-")) < below:
            try:
                return open_checkpoint(path), skipped_checkpoints
            except Damaged as error:
                skipped_checkpoints.append(f"{path.name}: {error}")
    return None, skipped_checkpoints


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest, and check that each file exists and has its size. Raises Damaged.

    The content of the files is verified when it is read.
    """
    manifest = read_manifest(path)
    for name, checksums in manifest["files"].items():
        block_io.check_file(path / name, checksums)
    return Checkpoint(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and verify the manifest of a checkpoint. Raises Damaged."""
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
    body, _, checksum = content.rpartition(CHECKSUM_KEY)
    if checksum != f"{zlib.crc32(body)}\n}}\n".encode():
        raise Damaged("manifest.json is damaged (it does not match its checksum)")
    if any(Path(name).name != name for name in manifest["files"]):
        raise Damaged("manifest.json names a file outside of the checkpoint's folder")
    return manifest


def write_manifest(path: Path, fields: Mapping[str, Any], table: str) -> None:
    """Write `manifest.json` into a folder, one key per line; `table` describes the tensors and is JSON already."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    body = ("{\n" + ",\n".join([*lines, f'"tensors": {table}'])).encode()
    block_io.write_bytes(path / MANIFEST, body + CHECKSUM_KEY + f"{zlib.crc32(body)}\n}}\n".encode())


def resolve_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint at a path, or the newest one if the path is a run's folder; and why newer ones were skipped.

    Raises UserError if there is none.
    """
    if (path / MANIFEST).is_file():
        try:
            return open_checkpoint(path), []
        except Damaged as error:
            raise UserError(f"--checkpoint {path}: {error}") from None
    found, skipped_checkpoints = newest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        problem = "no complete checkpoint in this folder" if path.is_dir() else "no such folder"
        if skipped_checkpoints:
            problem += f" ({'; '.join(skipped_checkpoints)})"
        raise UserError(f"--checkpoint {path}: {problem}; give a run folder, such as runs/tiny, or a checkpoint folder")
    return found, skipped_checkpoints


def no_usable_checkpoint(folder: Path, skipped_checkpoints: Sequence[str]) -> str:
    """The error message for a folder in which every checkpoint was skipped."""
    return (
        f"{folder}: no checkpoint in this folder can be used ({'; '.join(skipped_checkpoints)}); "
        "move the folder away to start again at step 0, or choose another run.name="
    )


def publish_checkpoint(partial: Path, final: Path) -> None:
    """Rename a complete folder to the name of a checkpoint."""
    block_io.flush(partial)
    if final.exists():  # the run resumed from an older checkpoint and reached this step again
        _remove(final)
    os.rename(partial, final)
    block_io.flush(final.parent)


def prune_checkpoints(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Remove checkpoints up to `step`, except the newest `keep` and those at multiples of `keep_every`.

    Checkpoints after `step` are neither removed nor counted: the run resumed from before them.
    """
    steps = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder)]
    for old in [s for s in steps if s <= step][:-keep]:
        if not keep_every or old % keep_every:
            _remove(folder / f"step-{old:08d}")


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a folder with the name of a checkpoint is always complete."""
    renamed = path.with_name(f".old-{path.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove the unfinished folders that killed processes left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
