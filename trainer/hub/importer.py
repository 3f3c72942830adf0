"""Weights in: from a folder in the Hugging Face layout, or a checkpoint, into a model on any mesh.

Names and shapes are compared with what config.json says before memory is asked for; then each rank reads its own part.
`import_folder` makes a checkpoint of such a folder, in one process.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from data.settings import UserError, check, dump, read
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.transformer import Transformer
from parallel.fsdp import to_local_with_window
from trainer import machine
from trainer.checkpoint.folder import TOKENIZER, resolve_checkpoint
from trainer.checkpoint.load import checkpoint_tensors, load_checkpoint
from trainer.checkpoint.saver import Saver
from trainer.config import SECTION_TYPES, CheckpointConfig
from trainer.hub.files import CONFIG, Folder
from trainer.hub.mapping import differences, from_llama, pieces, whole_shapes

FLOATS = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a run begins with: what is to be said of them, and what puts them into its model."""

    notes: list[str]
    fill: Callable[[Transformer], object]


def initial_weights(where: str, config: ModelConfig, vocab_size: int) -> InitialWeights:
    """What `train.init_from` names: a folder in their layout, a checkpoint, or a run's newest. Raises UserError."""
    path, key = Path(where), f"train.init_from={where}"
    fill: Callable[[Transformer], object]
    try:
        if (path / CONFIG).is_file():
            theirs = HFCheckpoint(path)
            there, size, fill = theirs.model, theirs.vocab_size, theirs.fill
        else:
            found, _ = resolve_checkpoint(path)
            manifest = found.manifest
            there, size = check(ModelConfig, "model", manifest["config"]["model"]), manifest["vocab_size"]
            fill = lambda model: load_checkpoint(found, model, others=False)  # noqa: E731
    except UserError as error:
        why = str(error).removeprefix("--checkpoint ").removeprefix(f"{path}: ")
        raise UserError(f"{key}: {why}") from None
    other = differences(there, config)
    if whole_shapes(there, size) != whole_shapes(config, vocab_size):
        if size != vocab_size:
            other.insert(0, f"the vocabulary is {size} there, {vocab_size} in the corpus's tokenizer")
        raise UserError(f"{key}: another model ({'; '.join(other)})")
    return InitialWeights([f"weights from {where}", *(f"not as in {where}: {each}" for each in other)], fill)


class HFCheckpoint:
    """A folder in their layout, which fits its config. Raises UserError where it does not."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path)
        self.model, self.vocab_size = from_llama(self.folder.config, str(path / CONFIG))
        text = "language_model."  # what the text part's names begin with in a multimodal model
        self.prefix = text if any(name.startswith(text) for name in self.folder.shapes) else ""
        fits(self.folder, self.model, self.vocab_size, self.prefix)

    def fill(self, model: Transformer) -> None:
        """Put the weights into a model of these shapes, on any mesh."""
        live = checkpoint_tensors(model)
        for ours, group in groupby(pieces(self.model, self.vocab_size), key=lambda piece: piece.ours):
            part, ((first, stop), *rest) = to_local_with_window(live[ours])
            for piece in group:
                a, b = max(first, piece.first), min(stop, piece.first + piece.shape[0])
                if a >= b or not part.numel():
                    continue
                here, name = part[a - first : b - first], self.prefix + piece.theirs
                if name in self.folder.shapes:
                    here.copy_(self.folder.read(name, [(a - piece.first, b - piece.first), *rest]))
                else:
                    here.zero_()  # the balance bias, which plain Llama 4 does not have


def fits(folder: Folder, config: ModelConfig, vocab_size: int, prefix: str = "") -> None:
    """Names and shapes of a folder against those of a model. Raises UserError on the first that is not so."""
    wanted = {prefix + piece.theirs: piece for piece in pieces(config, vocab_size)}
    for name, piece in wanted.items():
        shape = folder.shapes.get(name)
        if shape is None and not piece.theirs.endswith("balance_bias"):
            raise UserError(f"{folder.path}: {name} is missing")
        if shape is not None and shape != piece.shape:
            raise UserError(f"{folder.path}: {name} has shape {shape}, {CONFIG} says {piece.shape}")
        if shape is not None and folder.dtypes[name] not in FLOATS:
            raise UserError(f"{folder.path}: {name} is {folder.dtypes[name]}; weights are {', '.join(FLOATS)}")
    for name in folder.shapes:
        if name.startswith(prefix) and name not in wanted:
            raise UserError(f"{folder.path}: {name} has no place in this model")


def import_folder(source: Path, out: Path, tokenizer: Path | None) -> None:
    """Write the folder `out` with a checkpoint at step 0, weights only, and print the model's settings.

    Raises UserError; then nothing is left.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists; give another, or remove it")
    theirs = HFCheckpoint(source)
    path = tokenizer or source / TOKENIZER
    if tokenizer is None and not path.is_file():
        raise UserError(f"{path}: no such file; give --tokenizer, a sentencepiece model of {theirs.vocab_size} pieces")
    pieces_known = Tokenizer(path)
    if pieces_known.vocab_size != theirs.vocab_size:
        raise UserError(f"{path}: {pieces_known.vocab_size} pieces, but the model's vocabulary is {theirs.vocab_size}")
    need, free = 4 * theirs.model.parameter_counts(theirs.vocab_size)[0], machine.free_memory(torch.device("cpu"))
    if free is not None and need > free:
        raise UserError(
            f"{source}: takes {need:,} bytes of memory, {free:,} are free; a run can read it by its parts: "
            f"train.init_from={source}"
        )
    with torch.device("meta"):
        model = Transformer(theirs.model, theirs.vocab_size)
    model.to_empty(device="cpu")
    theirs.fill(model)
    seq_len = min(1024, theirs.model.max_seq_len)
    words = ["train.steps=1", f"data.vocab_size={theirs.vocab_size}", f"data.seq_len={seq_len}"]
    sections = read(SECTION_TYPES, None, words)
    sections["model"] = theirs.model
    fields = {
        "config": {name: section.model_dump() for name, section in sections.items()},
        "tokens": 0,
        "vocab_size": theirs.vocab_size,
        "tokenizer": pieces_known.hash,
        "imported_from": str(source),
    }
    partial, failures = out.with_name(f".{out.name}.partial"), list[str]()
    shutil.rmtree(partial, ignore_errors=True)
    saver = Saver(
        partial,
        checkpoint_tensors(model),
        path,
        CheckpointConfig(),
        tell=lambda step, seconds, why: failures.extend([why] if why else []),
    )
    try:
        saver.save(0, fields, wait=True)
        saver.close()
        if failures:
            raise UserError(f"--out {out}: cannot be written ({failures[0]})")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: a checkpoint of weights only; a run begins with them by train.init_from={out}")
    print(dump({"model": theirs.model}), end="")
