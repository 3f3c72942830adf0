"""Writes a checkpoint as a folder in the Hugging Face format: the command `python -m trainer.hub export`.

Tensors are read and written one at a time, whatever mesh wrote the checkpoint. The result is plain Llama 4 if Llama 4
can express the model. Otherwise a small modelling file is added (`modeling_llama4_biased.py`), and the command prints
the reason and, for a balance bias, how much it changes on the validation set.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from data.settings import UserError, check
from data.shards import Corpus
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.moe import Router
from model.transformer import Transformer
from parallel.mesh import World
from trainer import machine
from trainer.checkpoint import block_io, layout
from trainer.checkpoint.block_io import Damaged
from trainer.checkpoint.folder import TOKENIZER, resolve_checkpoint
from trainer.checkpoint.load import load_model
from trainer.config import Config
from trainer.evaluation import evaluate
from trainer.hub.files import CONFIG_FILE, Folder, ShardTensor, write_json, write_shards
from trainer.hub.importer import check_tensors
from trainer.hub.mapping import (
    MODELING_MODULE,
    TensorSlice,
    not_exportable,
    tensor_shapes,
    tensor_slices,
    to_hf_config,
)
from trainer.hub.tokenizer import export_tokenizer

BALANCE_BIAS = "the balance bias"


class CheckpointWeights:
    """The weights of a checkpoint, read one at a time.

    Raises UserError if there is no checkpoint, if its model has settings without a counterpart in the Hugging Face
    format, or if its tensors are not those of that model.
    """

    def __init__(self, path: Path) -> None:
        checkpoint, skipped_checkpoints = resolve_checkpoint(path)
        for reason in skipped_checkpoints:
            print(f"skipped checkpoint {reason}", file=sys.stderr)
        self.path, self.manifest = checkpoint.path, checkpoint.manifest
        self.config: ModelConfig = check(ModelConfig, "model", self.manifest["config"]["model"])
        if settings := not_exportable(self.config):
            raise UserError(
                f"{self.path}: cannot be exported: the Hugging Face format has no counterpart of {', '.join(settings)}"
            )
        self.vocab_size: int = self.manifest["vocab_size"]
        self._shapes = tensor_shapes(self.config, self.vocab_size)
        self._check_shapes()

    def _check_shapes(self) -> None:
        table = self.manifest["tensors"]
        stored = {name: tuple(entry["shape"]) for name, entry in table.items() if not name.startswith("optim.")}
        for name in sorted(self._shapes.keys() | stored.keys()):
            if name not in stored:
                raise UserError(f"{self.path}: tensor {name} is missing")
            if name not in self._shapes:
                raise UserError(f"{self.path}: tensor {name} is not part of the model that its config describes")
            if stored[name] != self._shapes[name]:
                shapes = f"has shape {stored[name]}, but its config requires {self._shapes[name]}"
                raise UserError(f"{self.path}: tensor {name} {shapes}")

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name])
        try:
            layout.read(self.path, self.manifest["files"], self.manifest["tensors"], {name: tensor})
        except Damaged as error:
            raise UserError(f"{self.path}: {error}") from None
        return tensor

    def not_expressible(self) -> list[str]:
        """The features of the model that plain Llama 4 cannot express."""
        config = self.config
        features = []
        biases = (self.read(f"blocks.{layer}.feed_forward.router.bias") for layer in config.moe_layers)
        if any(bool(bias.any()) for bias in biases):
            features.append(BALANCE_BIAS)
        if config.moe_layers and config.noisy_top_k:
            features.append("the noise matrices of noisy_top_k")
        if config.moe_layers and not config.shared_expert:
            features.append("layers without a shared expert")
        return features


def export(
    source: Path,
    out: Path,
    dtype: str,
    max_bytes: int,
    plain: bool,
    corpus_folder: str | None,
    batches: str,
    device: str = "cpu",
) -> None:
    """Write the folder `out`, and print what was written. Raises UserError, and then leaves no files behind.

    `dtype` is float32 or bfloat16. A file of weights has at most `max_bytes` bytes. `plain` leaves out everything that
    plain Llama 4 cannot express. The effect of a balance bias is measured on `batches` (run, all, none or a number) of
    the corpus in `corpus_folder` (by default the run's), on `device` (auto, cpu or cuda).
    """
    if out.exists():
        raise UserError(f"--out {out}: already exists; choose another folder, or remove it")
    weights = CheckpointWeights(source)
    not_expressible = weights.not_expressible()
    if plain and not weights.config.shared_expert:
        raise UserError(
            "--plain: Llama 4 has a shared expert in each MoE layer, and this model has none; export without --plain"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        written = _write(weights, partial, dtype, max_bytes, plain or not not_expressible)
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: written from step {weights.manifest['step']}, {written}")
    missing = " and ".join(not_expressible)
    if not not_expressible:
        print("plain Llama 4, which expresses all of this model; transformers loads it without trust_remote_code")
    elif plain:
        print(f"plain Llama 4 because of --plain, without {missing}: it computes other numbers than this model")
    else:
        print(
            f"Llama 4 with {MODELING_MODULE}.py, because plain Llama 4 cannot express {missing}; load it with "
            "trust_remote_code=True"
        )
    if BALANCE_BIAS in not_expressible:
        print(f"without the balance bias, {_effect_of_bias(weights, corpus_folder, batches, device)}")


def _write(weights: CheckpointWeights, folder: Path, dtype: str, max_bytes: int, plain: bool) -> str:
    """Write all files of an export into `folder`. Returns what was written, in words."""
    config, vocab_size = weights.config, weights.vocab_size
    tokenizer = Tokenizer(weights.path / TOKENIZER)
    slices = [entry for entry in tensor_slices(config, vocab_size) if entry.is_plain or not plain]
    tensors = [ShardTensor(entry.hf_name, _stored_dtype(entry, dtype), entry.shape) for entry in slices]
    n_files = write_shards(folder, tensors, _read_slices(weights, slices), max_bytes)
    write_json(folder / CONFIG_FILE, to_hf_config(config, vocab_size, tokenizer.bos, tokenizer.eos, dtype, plain))
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    write_json(folder / "generation_config.json", ids)
    if not plain:
        shutil.copyfile(Path(__file__).with_name(f"{MODELING_MODULE}.py"), folder / f"{MODELING_MODULE}.py")
    size = sum(tensor.size for tensor in tensors)
    written = f"{size:,} bytes of weights in {dtype}, in {n_files} file{'s' * (n_files != 1)}"
    try:
        export_tokenizer(tokenizer, folder, config.max_seq_len)
    except UserError as error:
        shutil.copyfile(tokenizer.path, folder / TOKENIZER)
        written += f"; with {TOKENIZER}, but without tokenizer.json: {error}"
    check_tensors(Folder(folder), config, vocab_size)
    for path in [*folder.iterdir(), folder]:
        block_io.flush(path)
    return written


def _stored_dtype(entry: TensorSlice, dtype: str) -> torch.dtype:
    """fp32 for the balance bias, which is exact in every export: modeling_llama4_biased.py keeps it in fp32 too."""
    if entry.hf_name.endswith("_bias"):
        return torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _read_slices(weights: CheckpointWeights, slices: Sequence[TensorSlice]) -> Iterator[tuple[str, Tensor]]:
    """(name in the Hugging Face format, tensor) of each slice; one of our tensors is in memory at a time."""
    for name, group in groupby(slices, key=lambda entry: entry.name):
        tensor = weights.read(name)
        for entry in group:
            yield entry.hf_name, tensor[entry.start : entry.stop]
        del tensor  # frees it before the next one is read


def _effect_of_bias(weights: CheckpointWeights, corpus_folder: str | None, batches: str, device: str) -> str:
    """How many validation tokens would be routed elsewhere without the bias, and the loss, or why it is unknown."""
    unknown = "some tokens would be sent to other experts; their number was not measured"
    if batches == "none":
        return f"{unknown} (--batches none)"
    needed = 4 * weights.config.parameter_counts(weights.vocab_size)[0]
    free = machine.free_memory(torch.device("cpu"))
    if free is not None and needed > 0.8 * free:
        return f"{unknown}, because the whole model needs {needed:,} bytes of memory and {free:,} are free"
    try:
        corpus = Corpus.open(corpus_folder or weights.manifest["config"]["data"]["dir"])
    except UserError as error:
        return f"{unknown}: {error}"
    if corpus.tokenizer().hash != weights.manifest["tokenizer"]:
        return f"{unknown}, because {corpus.folder} was prepared with another tokenizer"
    machine.set_threads("auto", World())
    model, _, config = load_model(weights.path, device)
    return _compare_routing(model, corpus, config, config.eval.batches if batches == "run" else batches)


def _compare_routing(model: Transformer, corpus: Corpus, config: Config, batches: int | str) -> str:
    """Evaluates a model with its balance bias and without it; returns what differs, in words."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    changed: list[Tensor] = []  # (real tokens,) bool, of each layer of each batch: whether its experts would differ

    def compare(router: Router, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x, is_real = inputs[:2]
        without_bias = torch.topk(x.float() @ router.weight.t(), router.top_k, dim=-1).indices
        with_bias = output[1]
        changed.append((without_bias.sort(-1).values != with_bias.sort(-1).values).any(-1)[is_real])

    hooks = [router.register_forward_hook(compare) for router in routers]
    line = evaluate(model, corpus, config, batches, World())
    for router, hook in zip(routers, hooks, strict=True):
        hook.remove()
        router.bias.zero_()
    loss = evaluate(model, corpus, config, batches, World())["loss"]
    n_layers, n_tokens = len(routers), line["tokens"]
    per_batch = [torch.stack(changed[i : i + n_layers]) for i in range(0, len(changed), n_layers)]  # (layers, tokens)
    changed_tokens = sum(int(layers.any(0).sum()) for layers in per_batch)
    changed_choices = sum(int(layers.sum()) for layers in per_batch)
    return (
        f"{changed_tokens:,} of {n_tokens:,} validation tokens ({changed_tokens / n_tokens:.1%}) would be sent to "
        f"other experts in at least one layer ({changed_choices:,} of {n_tokens * n_layers:,} choices, "
        f"{line['stories']:,} stories), and the loss would be {loss:.4f} instead of {line['loss']:.4f} nats per token"
    )
