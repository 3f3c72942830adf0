"""Reads the weights of a folder in the Hugging Face format, or of a checkpoint, into a model on any mesh.

`initial_weights` serves `train.init_from`: a new run starts with weights that exist. `import_folder` is the command
`python -m trainer.hub import`, which converts a folder to a checkpoint in one process. Both compare names and shapes
with config.json before they allocate memory; then each rank reads only its own shard.
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
from trainer.hub.files import CONFIG_FILE, Folder
from trainer.hub.mapping import differences, from_hf_config, tensor_shapes, tensor_slices

FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
TEXT_PREFIX = "language_model."  # in a multimodal model the names of the text model's tensors begin with it


@dataclass(frozen=True)
class InitialWeights:
    """Weights for a new run. `fill` copies them into its model; `notes` are lines to log about them."""

    notes: list[str]
    fill: Callable[[Transformer], object]


def initial_weights(source: str, config: ModelConfig, vocab_size: int) -> InitialWeights:
    """The weights that `train.init_from=source` names: a folder in the Hugging Face format, a checkpoint, or a run.

    Of a run it is the newest checkpoint. Raises UserError if there is none, or if a model of `config` and `vocab_size`
    has tensors of other shapes.
    """
    path, setting = Path(source), f"train.init_from={source}"
    fill: Callable[[Transformer], object]
    try:
        if (path / CONFIG_FILE).is_file():
            folder = HFCheckpoint(path)
            found_config, found_vocab_size, fill = folder.model, folder.vocab_size, folder.fill
        else:
            found_config, found_vocab_size, fill = _checkpoint_weights(path)
    except UserError as error:
        why = str(error).removeprefix("--checkpoint ").removeprefix(f"{path}: ")
        raise UserError(f"{setting}: {why}") from None
    different = differences(found_config, config)
    if tensor_shapes(found_config, found_vocab_size) != tensor_shapes(config, vocab_size):
        if found_vocab_size != vocab_size:
            different.insert(0, f"the vocabulary has {found_vocab_size} tokens there, {vocab_size} in this corpus")
        raise UserError(
            f"{setting}: its weights do not fit this model ({'; '.join(different)}); set the same values here"
        )
    notes = [f"initial weights from {source}"]
    notes += [f"initial weights from {source}: {difference}" for difference in different]
    return InitialWeights(notes, fill)


def _checkpoint_weights(path: Path) -> tuple[ModelConfig, int, Callable[[Transformer], object]]:
    """(settings of the model, vocabulary size, `fill`) of our own checkpoint. Raises UserError if there is none."""
    checkpoint, _ = resolve_checkpoint(path)
    config: ModelConfig = check(ModelConfig, "model", checkpoint.manifest["config"]["model"])

    def fill(model: Transformer) -> None:
        load_checkpoint(checkpoint, model, others=False)

    return config, checkpoint.manifest["vocab_size"], fill


class HFCheckpoint:
    """The weights of a folder in the Hugging Face format, and the model that its config.json describes.

    Raises UserError if the tensors are not those of that model.
    """

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path)
        self.model, self.vocab_size = from_hf_config(self.folder.config, str(path / CONFIG_FILE))
        is_multimodal = any(name.startswith(TEXT_PREFIX) for name in self.folder.shapes)
        self.prefix = TEXT_PREFIX if is_multimodal else ""
        check_tensors(self.folder, self.model, self.vocab_size, self.prefix)

    def fill(self, model: Transformer) -> None:
        """Copy the weights into a model of these shapes, on any mesh: each rank reads the shard that it holds."""
        live = checkpoint_tensors(model)
        for name, slices in groupby(tensor_slices(self.model, self.vocab_size), key=lambda entry: entry.name):
            local, ((first, stop), *other_dims) = to_local_with_window(
                live[name]
            )  # this rank holds the rows `first` up to `stop`
            for entry in slices:
                start, end = max(first, entry.start), min(stop, entry.stop)  # of these, the rows of the slice
                if start >= end or not local.numel():
                    continue
                rows, hf_name = local[start - first : end - first], self.prefix + entry.hf_name
                if hf_name in self.folder.shapes:
                    hf_rows = (start - entry.start, end - entry.start)
                    rows.copy_(self.folder.read(hf_name, [hf_rows, *other_dims]))
                else:
                    rows.zero_()  # the balance bias, which plain Llama 4 does not have


def check_tensors(folder: Folder, config: ModelConfig, vocab_size: int, prefix: str = "") -> None:
    """Raises UserError if the tensors of a folder are not those of a model: by name, shape and kind of number.

    Only names that begin with `prefix` are compared.
    """
    expected = {prefix + entry.hf_name: entry for entry in tensor_slices(config, vocab_size)}
    for name, entry in expected.items():
        if name not in folder.shapes:
            if entry.hf_name.endswith("balance_bias"):
                continue  # plain Llama 4 does not have it
            raise UserError(f"{folder.path}: tensor {name} is missing")
        if folder.shapes[name] != entry.shape:
            shapes = f"has shape {folder.shapes[name]}, but {CONFIG_FILE} requires {entry.shape}"
            raise UserError(f"{folder.path}: tensor {name} {shapes}")
        if folder.dtypes[name] not in FLOAT_DTYPES:
            dtypes = f"has dtype {folder.dtypes[name]}; weights must have one of {', '.join(FLOAT_DTYPES)}"
            raise UserError(f"{folder.path}: tensor {name} {dtypes}")
    for name in folder.shapes:
        if name.startswith(prefix) and name not in expected:
            raise UserError(f"{folder.path}: tensor {name} is not part of the model that {CONFIG_FILE} describes")


def import_folder(source: Path, out: Path, tokenizer_path: Path | None) -> None:
    """Write the folder `out`: a checkpoint at step 0 with weights only. Prints the settings of the model.

    Raises UserError, and then leaves no files behind. `tokenizer_path` is by default the tokenizer.model of `source`.
    """
    if out.exists():
        raise UserError(f"--out {out}: already exists; choose another folder, or remove it")
    folder = HFCheckpoint(source)
    path = tokenizer_path or source / TOKENIZER
    if tokenizer_path is None and not path.is_file():
        hint = f"give a sentencepiece model with {folder.vocab_size} pieces by --tokenizer FILE"
        raise UserError(f"{path}: no such file; {hint}")
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size != folder.vocab_size:
        vocabulary = f"the vocabulary of the model has {folder.vocab_size}"
        raise UserError(f"{path}: has {tokenizer.vocab_size} pieces, but {vocabulary}; give another by --tokenizer")
    needed = 4 * folder.model.parameter_counts(folder.vocab_size)[0]
    free = machine.free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(
            f"{source}: needs {needed:,} bytes of memory, but only {free:,} are free; instead, start a run with "
            f"train.init_from={source}, in which each process reads only its shard"
        )
    with torch.device("meta"):
        model = Transformer(folder.model, folder.vocab_size)
    model.to_empty(device="cpu")
    folder.fill(model)
    _save(model, folder, source, out, tokenizer)
    print(f"{out}: written, a checkpoint with weights only; to start a run with them, set train.init_from={out}")
    print(dump({"model": folder.model}), end="")


def _save(model: Transformer, folder: HFCheckpoint, source: Path, out: Path, tokenizer: Tokenizer) -> None:
    """Write the checkpoint, first under another name. Raises UserError if it cannot be written."""
    seq_len = min(1024, folder.model.max_seq_len)
    words = ["train.steps=1", f"data.vocab_size={folder.vocab_size}", f"data.seq_len={seq_len}"]
    sections = read(SECTION_TYPES, None, words)
    sections["model"] = folder.model
    fields = {
        "config": {name: section.model_dump() for name, section in sections.items()},
        "tokens": 0,
        "vocab_size": folder.vocab_size,
        "tokenizer": tokenizer.hash,
        "imported_from": str(source),
    }
    failures: list[str] = []

    def note_failure(step: int, seconds: float, why: str | None) -> None:
        if why is not None:
            failures.append(why)

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    saver = Saver(partial, checkpoint_tensors(model), tokenizer.path, CheckpointConfig(), on_saved=note_failure)
    try:
        saver.save(0, fields, wait=True)
        saver.close()
        if failures:
            raise UserError(f"--out {out}: cannot be written ({failures[0]})")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
