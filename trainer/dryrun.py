"""`--dry-run`: what a run would be, in numbers, without starting it."""

from pathlib import Path

import torch

from data.config import dump
from data.loader import Share
from model.config import ModelConfig
from model.loss import CHUNK_LOGITS, CHUNK_TOKENS
from parallel import mesh
from parallel.experts import Owners
from parallel.mesh import Degrees, World
from trainer import machine
from trainer.config import Config
from trainer.start import degrees, open_corpus


def print_plan(config: Config) -> None:
    """Resolved config, mesh, parameters, memory, steps, tokens, filler rows. Raises UserError."""
    world = World.from_environment()
    if world.rank != 0:
        return
    device = machine.choose_device(config.run.device, world)
    dtype = machine.choose_dtype(config.train.dtype, device, config.model.dim)
    d = degrees(config, world)
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
    need, free = memory_needed(config, vocab_size, dtype, d, share.rows), machine.free_memory(device)
    here = "" if free is None else f"; free here: {_gib(free)}" + ("" if device.type == "cuda" else " for all ranks")
    print(f"mesh        {world.size} processes: replicate {d.replicate} x shard {d.shard}, "
          f"on {machine.describe(device)}")  # fmt: skip
    if config.model.moe_layers:
        owners = Owners(config.model.n_experts, d.expert)
        print(f"experts     {owners.n_experts} over {d.expert} ranks, {owners.slots} slots each "
              f"({owners.waste - 1:.0%} more than needed), each sharded over {d.rest}")  # fmt: skip
    if advice := mesh.advice(world, config.model, d):
        print(f"            {advice}")
    print(f"parameters  {total:,} in all, {active:,} active a token; products in {str(dtype)[6:]}")
    print(f"memory      about {_gib(need)} a rank{here}")
    staged = f"; staged in {_gib(12 * total // world.size)} of memory a rank" if config.checkpoint.async_save else ""
    print(f"checkpoint  about {_gib(12 * total)} on disk, keep {config.checkpoint.keep}{staged}")
    print(f"batch       {tokens:,} tokens: {share.micro_batches} micro-batches of {share.rows} rows a rank, "
          f"{share.filler} filler rows a step")  # fmt: skip
    print(f"run         {length}; corpus: {corpus}; folder {config.run.folder}")


def memory_needed(config: Config, vocab_size: int, dtype: torch.dtype, d: Degrees, rows: int) -> int:
    """Bytes a rank needs, roughly: weights and optimizer state, gradients, gathered weights, activations."""
    model, train = config.model, config.train
    total, _ = model.parameter_counts(vocab_size)
    expert, moe = 3 * model.dim * model.expert_dim, len(model.moe_layers)
    dense = total - moe * model.n_experts * expert
    slots = moe * Owners(model.n_experts, d.expert).slots * expert  # of the experts' ranks, before they are sharded
    several = -(-train.global_batch_size // (d.replicate * d.shard)) > train.micro_batch_size and train.reduce == "once"
    held = dense // d.shard + slots // d.rest
    state = 12 * held  # fp32 weights and two moments
    grads = 4 * (dense + slots if several else held)  # summed unsharded between micro-batches
    gathered = 0
    if d.shard > 1:
        block = dense // model.n_layers + (slots // max(1, moe) if d.rest > 1 else 0)
        gathered = 2 * dtype.itemsize * max(block, vocab_size * model.dim)
    tokens = rows * config.data.seq_len
    layers = sum(kept_numbers(model, layer, train.recompute) for layer in range(model.n_layers))
    activations = tokens * (layers * dtype.itemsize + 16 * model.dim)
    # its gradient, some logits
    head = 4 * (vocab_size * model.dim + 2 * max(CHUNK_TOKENS * vocab_size, CHUNK_LOGITS["cpu"]))
    return state + grads + gathered + activations + head


def kept_numbers(model: ModelConfig, layer: int, recompute: str) -> int:
    """Numbers a token that a block keeps from its forward to its backward (docs/parallel.md has the table)."""
    d, heads = model.dim, 4 * model.head * (model.n_heads + model.kv_heads)
    none, full = recompute == "none", recompute == "full"
    attention = 2 * d + heads if none else d
    if not model.is_moe(layer):
        return attention + 2 * d + (0 if full else 3 * model.ffn_dim)
    routed = model.top_k * d + (3 * model.top_k * model.expert_dim if none else 0)
    shared = model.expert_dim * (1 if full else 3) if model.shared_expert else 0
    return attention + 2 * d + routed + shared


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
