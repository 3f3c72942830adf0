"""A checkpoint, whatever mesh wrote it -> a folder in the Hugging Face layout, one tensor at a time.

It is plain Llama 4 where Llama 4 can say all that the model is; else a small modelling file goes with it
(`modeling_llama4_biased.py`), and the command says why, and what the balance bias does on the validation set.
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
from parallel.mesh import World
from trainer import machine
from trainer.checkpoint import block_io, layout
from trainer.checkpoint.block_io import Damaged
from trainer.checkpoint.folder import TOKENIZER, resolve_checkpoint
from trainer.checkpoint.load import load_model
from trainer.evaluate import evaluate
from trainer.hub.files import CONFIG, Entry, Folder, write_json, write_shards
from trainer.hub.importer import fits
from trainer.hub.mapping import MODELING, Piece, pieces, to_llama, whole_shapes
from trainer.hub.tokenizer import export_tokenizer

BIAS = "the balance bias"


class Stored:
    """The weights of a checkpoint, read one at a time. Raises UserError where they are not those of its config."""

    def __init__(self, path: Path) -> None:
        found, passed_over = resolve_checkpoint(path)
        for why in passed_over:
            print(f"passed over {why}", file=sys.stderr)
        self.path, self.manifest = found.path, found.manifest
        self.config: ModelConfig = check(ModelConfig, "model", self.manifest["config"]["model"])
        self.vocab_size: int = self.manifest["vocab_size"]
        table = self.manifest["tensors"]
        there = {name: tuple(stored["shape"]) for name, stored in table.items() if not name.startswith("optim.")}
        self._shapes = whole_shapes(self.config, self.vocab_size)
        for name in sorted(self._shapes.keys() | there.keys()):
            if there.get(name) != self._shapes.get(name):
                shapes = f"has shape {there.get(name)}, its config says {self._shapes.get(name)}"
                raise UserError(f"{self.path}: {name} {shapes}")

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name])
        try:
            layout.read(self.path, self.manifest["files"], self.manifest["tensors"], {name: tensor})
        except Damaged as error:
            raise UserError(f"{self.path}: {error}") from None
        return tensor

    def not_expressible(self) -> list[str]:
        """What plain Llama 4 has no place for."""
        c, reasons = self.config, []
        if any(bool(self.read(f"blocks.{i}.feed_forward.router.bias").any()) for i in c.moe_layers):
            reasons.append(BIAS)
        if c.moe_layers and c.noisy_top_k:
            reasons.append("the noise matrices of noisy_top_k")
        if c.moe_layers and not c.shared_expert:
            reasons.append("layers without a shared expert")
        return reasons


def export(
    source: Path, out: Path, dtype: str, limit: int, plain: bool, corpus: str | None, batches: str, device: str = "cpu"
) -> None:
    """Write the folder `out` in files of `limit` bytes, and say what it is. Raises UserError; then nothing is left.

    `plain` leaves out what Llama 4 has no place for. On `batches` of `corpus` it is counted what a bias does, on
    `device` (auto, cpu or cuda).
    """
    if out.exists():
        raise UserError(f"--out {out}: exists; give another, or remove it")
    stored = Stored(source)
    reasons = stored.not_expressible()
    if plain and not stored.config.shared_expert:
        raise UserError("--plain: Llama 4 has a shared expert beside the others, and this model has none")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        written = _write(stored, partial, dtype, limit, plain or not reasons)
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: step {stored.manifest['step']}, {written}")
    if not reasons:
        print("plain Llama 4, which can say all that this model is")
    elif plain:
        print(f"plain Llama 4, as asked for: without {' and '.join(reasons)}")
    else:
        print(f"Llama 4 and {MODELING}.py, to be loaded with trust_remote_code=True: for {' and '.join(reasons)}")
    if BIAS in reasons:
        print(f"without the bias {what_the_bias_does(stored, corpus, batches, device)}")


def _write(stored: Stored, folder: Path, dtype: str, limit: int, plain: bool) -> str:
    """All files of an export. Returns how large they are, in words."""
    config, vocab_size = stored.config, stored.vocab_size
    tokenizer = Tokenizer(stored.path / TOKENIZER)
    kept = [piece for piece in pieces(config, vocab_size) if piece.plain or not plain]
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    entries = [Entry(p.theirs, torch.float32 if p.theirs.endswith("_bias") else kind, p.shape) for p in kept]
    files = write_shards(folder, entries, _tensors(stored, kept), limit)
    write_json(folder / CONFIG, to_llama(config, vocab_size, tokenizer.bos, tokenizer.eos, dtype, plain))
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    write_json(folder / "generation_config.json", ids)
    if not plain:
        shutil.copyfile(Path(__file__).with_name(f"{MODELING}.py"), folder / f"{MODELING}.py")
    written = f"{sum(entry.size for entry in entries):,} bytes of weights in {dtype}, files: {files}"
    try:
        export_tokenizer(tokenizer, folder, config.max_seq_len)
    except UserError as error:
        shutil.copyfile(tokenizer.path, folder / TOKENIZER)
        written += f"; tokenizer.model, but no tokenizer.json: {error}"
    fits(Folder(folder), config, vocab_size)
    for path in [*folder.iterdir(), folder]:
        block_io.flush(path)
    return written


def _tensors(stored: Stored, kept: Sequence[Piece]) -> Iterator[tuple[str, Tensor]]:
    for ours, group in groupby(kept, key=lambda piece: piece.ours):
        whole = stored.read(ours)
        for piece in group:
            yield piece.theirs, whole[piece.first : piece.first + piece.shape[0]]
        del whole  # before the next one is read


def what_the_bias_does(stored: Stored, folder: str | None, batches: str, device: str) -> str:
    """How many validation tokens would meet another expert without the bias, and the loss, or why it is not known."""
    unknown = "tokens would meet other experts; how many was not counted"
    if batches == "none":
        return unknown
    need, free = 4 * stored.config.parameter_counts(stored.vocab_size)[0], machine.free_memory(torch.device("cpu"))
    if free is not None and need > 0.8 * free:
        return f"{unknown}: the whole model takes {need:,} bytes of memory, {free:,} are free"
    try:
        corpus = Corpus.open(folder or stored.manifest["config"]["data"]["dir"])
    except UserError as error:
        return f"{unknown}: {error}"
    if corpus.tokenizer().hash != stored.manifest["tokenizer"]:
        return f"{unknown}: {corpus.folder} has another tokenizer"
    machine.set_threads("auto", World())
    model, _, config = load_model(stored.path, device)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    turned: list[Tensor] = []  # of each layer of each batch in turn, whether each token is sent elsewhere

    def compare(router: Router, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x, real = inputs[:2]
        without = torch.topk(x.float() @ router.weight.t(), router.top_k, dim=-1).indices
        turned.append((without.sort(-1).values != output[1].sort(-1).values).any(-1)[real])

    hooks = [router.register_forward_hook(compare) for router in routers]
    count = batches if batches != "run" else config.eval.batches
    line = evaluate(model, corpus, config, count, World())
    for router, hook in zip(routers, hooks, strict=True):
        hook.remove()
        router.bias.zero_()
    loss = evaluate(model, corpus, config, count, World())["loss"]
    layers, tokens = len(routers), line["tokens"]
    some = sum(int(torch.stack(turned[i : i + layers]).any(0).sum()) for i in range(0, len(turned), layers))
    choices = sum(int(each.sum()) for each in turned)
    return (
        f"{some:,} of {tokens:,} validation tokens ({some / tokens:.1%}) would meet another expert in some layer: "
        f"{choices:,} of {tokens * layers:,} choices, in {line['stories']:,} stories; their loss would be {loss:.4f} "
        f"instead of {line['loss']:.4f} nats per token"
    )
