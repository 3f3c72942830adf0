"""`--dry-run`: what a run would be, in numbers, without starting it."""

from pathlib import Path

import torch

from data.loader import BatchLayout
from data.settings import dump
from parallel import mesh
from parallel.experts import ExpertPlacement
from parallel.mesh import World
from trainer import machine
from trainer.config import Config
from trainer.memory import OUTSIDE, Memory, memory_needed
from trainer.startup import degrees, open_corpus


def print_plan(config: Config) -> None:
    """Resolved config, mesh, parameters, FLOPs, memory, steps, tokens, filler rows. Raises UserError."""
    world = World.from_environment()
    if world.rank != 0:
        return
    device = machine.choose_device(config.run.device, world)
    dtype = machine.choose_dtype(config.train.dtype, device, config.model.dim)
    d = degrees(config, world)
    share = BatchLayout(config.train.global_batch_size, config.train.micro_batch_size, world.size)
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
    need, free = memory_needed(config, vocab_size, dtype, d, share), machine.free_memory(device)
    here = "" if free is None else f"; free here: {_gib(free)}" + ("" if device.type == "cuda" else " for all ranks")
    print(
        f"mesh        {world.size} processes: replicate {d.replicate} x shard {d.shard}, on {machine.describe(device)}"
    )
    if config.model.moe_layers:
        owners = ExpertPlacement(config.model.n_experts, d.expert)
        print(
            f"experts     {owners.n_experts} over {d.expert} ranks, {owners.slots} slots each "
            f"({owners.padding_ratio - 1:.0%} more than needed), each sharded over {d.expert_shard}"
        )
    if advice := mesh.padding_warning(world, config.model, d):
        print(f"            {advice}")
    print(f"parameters  {total:,} in all, {active:,} active a token; products in {str(dtype)[6:]}")
    print(f"compute     {compute(config, vocab_size, tokens, device, dtype)}")
    print(f"memory      about {_gib(need.total)} a rank at its peak{here}")
    for line in memory_table(need, device, dtype):
        print(f"            {line}")
    staged = f"; staged in {_gib(12 * total // world.size)} of memory a rank" if config.checkpoint.async_save else ""
    print(f"checkpoint  about {_gib(12 * total)} on disk, keep {config.checkpoint.keep}{staged}")
    print(
        f"batch       {tokens:,} tokens: {share.micro_batches} micro-batches of {share.rows} rows a rank, "
        f"{share.filler} filler rows a step"
    )
    print(f"run         {length}; corpus: {corpus}; folder {config.run.folder}")


def compute(config: Config, vocab_size: int, tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    """What a step computes, and the peak that MFU is a part of."""
    flops = tokens * config.model.flops_per_token(vocab_size, config.data.seq_len)
    text = f"{flops / 1e12:,.4g} TFLOP a step"
    if device.type != "cuda":
        return text
    peak, name = machine.peak_flops(device, dtype), machine.describe(device)
    if peak is None:
        return f"{text}; no MFU, since the peak of {name} in {str(dtype)[6:]} is not known"
    return f"{text}; MFU is the part of {peak / 1e12:g} TFLOP/s, the peak of {name} in {str(dtype)[6:]}"


def memory_table(need: Memory, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A line for each part of the memory, and what the parts leave out."""
    words = {
        "state": "weights and optimizer state",
        "gradients": "gradients",
        "weights": f"weights gathered or cast, {str(dtype)[6:]}",
        "activations": "activations",
        "working": need.moment,
        "messages": "messages",
    }
    lines = [f"{words[part]:34} {_gib(size):>12}" for part, size in need.parts().items()]
    if device.type == "cuda":
        lines.append(f"besides, not counted by torch's allocator: {OUTSIDE}")
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
