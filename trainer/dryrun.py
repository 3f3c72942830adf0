"""`--dry-run`: what a run would be, in numbers, without starting it."""

from pathlib import Path

import torch

from data.config import dump
from data.loader import Share
from parallel.mesh import World
from trainer import machine
from trainer.config import Config
from trainer.loop import mesh_degrees, open_corpus


def print_plan(config: Config) -> None:
    """Resolved config, mesh, parameters, memory, steps, tokens, filler rows. Raises UserError."""
    world = World.from_environment()
    if world.rank != 0:
        return
    device = machine.choose_device(config.run.device, world)
    dtype = machine.choose_dtype(config.train.dtype, device)
    replicate, shard = mesh_degrees(config, world)
    share = Share(config.train.global_batch_size, config.train.micro_batch_size, world.size)
    if (Path(config.data.dir) / "manifest.json").exists():
        _, tokenizer, loader, steps = open_corpus(config, world, device)
        vocab_size, corpus = tokenizer.vocab_size, f"{len(loader.rows):,} rows in {config.data.dir}"
    else:
        vocab_size, corpus = config.data.vocab_size, f"{config.data.dir} is not prepared yet"
        steps = config.train.steps or 0
    total, active = config.model.parameter_counts(vocab_size)
    print(dump(config.sections()))
    tokens = share.global_batch_size * config.data.seq_len
    length = f"{steps:,} steps, {steps * tokens:,} tokens" if steps else "steps are known when the corpus is"
    need, free = memory_needed(config, vocab_size, dtype, shard, share.rows), machine.free_memory(device)
    here = "" if free is None else f"; free here: {_gib(free)}" + ("" if device.type == "cuda" else " for all ranks")
    print(f"mesh        {world.size} processes: replicate {replicate} x shard {shard}, on {machine.describe(device)}")
    print(f"parameters  {total:,} in all, {active:,} active a token; products in {str(dtype)[6:]}")
    print(f"memory      about {_gib(need)} a rank{here}")
    print(f"batch       {tokens:,} tokens: {share.micro_batches} micro-batches of {share.rows} rows a rank, "
          f"{share.filler} filler rows a step")  # fmt: skip
    print(f"run         {length}; corpus: {corpus}; folder {config.run.folder}")


def memory_needed(config: Config, vocab_size: int, dtype: torch.dtype, shard: int, rows: int) -> int:
    """Bytes a rank needs, roughly: weights and optimizer state, gradients, gathered weights, activations."""
    model, train = config.model, config.train
    total, _ = model.parameter_counts(vocab_size)
    several = -(-train.global_batch_size // shard) > train.micro_batch_size and train.reduce == "once"
    state = 12 * total // shard  # fp32 weights and two moments
    grads = 4 * total // (1 if several else shard)  # summed unsharded between micro-batches
    if shard == 1:
        gathered = 0
    else:
        block = model.model_copy(update={"n_layers": 1, "moe_every": min(1, model.moe_every)}).parameter_counts(0)[0]
        gathered = 2 * dtype.itemsize * max(block, vocab_size * model.dim)
    tokens = rows * config.data.seq_len
    hidden = (model.top_k + model.shared_expert) * model.expert_dim
    width = 14 * model.dim + 2 * model.head * (model.n_heads + 2 * model.kv_heads) + 5 * hidden
    return state + grads + gathered + tokens * width * model.n_layers * dtype.itemsize + tokens * model.dim * 16


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


