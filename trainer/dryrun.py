"""The plan of a run, which `--dry-run` prints without starting it: mesh, parameters, compute, memory, batch, steps."""

from pathlib import Path

import torch

from data.loader import BatchLayout
from data.settings import dump
from parallel import mesh
from parallel.experts import ExpertPlacement
from parallel.mesh import Degrees, World
from trainer import devices, machine
from trainer.config import Config
from trainer.machine import dtype_name
from trainer.memory import OUTSIDE_ALLOCATOR, Memory, memory_needed
from trainer.optimizer import bytes_per_weight
from trainer.startup import degrees, open_corpus
from trainer.terminal import plural


def print_plan(config: Config) -> None:
    """Print the settings and the plan, on rank 0. Raises UserError if the settings do not fit corpus or processes."""
    world = World.from_environment()
    if world.rank != 0:
        return
    device = devices.choose_device(config.run.device, world)
    dtype = machine.choose_dtype(config.train.dtype, device, config.model.dim)
    layout = BatchLayout(config.train.global_batch_size, config.train.micro_batch_size, world.size)
    if (Path(config.data.dir) / "manifest.json").exists():
        _, tokenizer, loader, steps = open_corpus(config, world, device)
        vocab_size = tokenizer.vocab_size
        corpus = f"{len(loader.rows):,} rows in {config.data.dir}"
    else:
        steps = config.train.steps or 0
        vocab_size = config.data.vocab_size
        corpus = f"{config.data.dir} is not prepared yet"
    global_tokens = layout.global_batch_size * config.data.seq_len
    total, active = config.model.parameter_counts(vocab_size)

    print(dump(config.sections()))
    for line in mesh_lines(config, world, device):
        print(line)
    print(f"parameters  {total:,} in all, {active:,} active per token; matrix multiplications in {dtype_name(dtype)}")
    print(f"compute     {compute(config, vocab_size, global_tokens, device, dtype)}")
    for line in memory_lines(config, vocab_size, dtype, degrees(config, world), layout, device):
        print(line)
    print(checkpoint_line(config, total, world))
    print(
        f"batch       {global_tokens:,} tokens: {layout.micro_batches} micro-batches of {layout.rows} rows per rank, "
        f"{layout.padding_rows} filler rows per step"
    )
    length = "the number of steps depends on the corpus"
    if steps:
        length = f"{steps:,} steps, {steps * global_tokens:,} tokens"
    print(f"run         {length}; corpus: {corpus}; folder {config.run.folder}")


def mesh_lines(config: Config, world: World, device: torch.device) -> list[str]:
    """Lines about the processes, and about the experts that each of them has."""
    d = degrees(config, world)
    processes = plural(world.size, "process")
    lines = [
        f"mesh        {processes}: replicate {d.replicate} x shard {d.shard}, on {machine.describe_device(device)}",
    ]
    if config.model.moe_layers:
        placement = ExpertPlacement(config.model.n_experts, d.expert)
        lines.append(
            f"experts     {placement.n_experts} over {plural(d.expert, 'rank')}, {placement.slots} slots per rank "
            f"({placement.padding_ratio - 1:.0%} more than needed), each expert sharded over {d.expert_shard}"
        )
    advice = mesh.padding_warning(world, config.model, d)
    if advice is not None:
        lines.append(f"            {advice}")
    return lines


def compute(config: Config, vocab_size: int, tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    """The operations of a step of `tokens` tokens, and on a GPU the peak that MFU is relative to."""
    flops = tokens * config.model.flops_per_token(vocab_size, config.data.seq_len)
    text = f"{flops / 1e12:,.4g} TFLOP per step"
    if device.type != "cuda":
        return text
    peak = devices.peak_flops(device, dtype)
    name = machine.describe_device(device)
    if peak is None:
        return f"{text}; no MFU, because the peak of {name} in {dtype_name(dtype)} is not known"
    return f"{text}; MFU is relative to {peak / 1e12:g} TFLOP/s, the peak of {name} in {dtype_name(dtype)}"


def memory_lines(
    config: Config, vocab_size: int, dtype: torch.dtype, degrees: Degrees, layout: BatchLayout, device: torch.device
) -> list[str]:
    """The estimated peak of a rank's memory, the memory that is free, and the parts of the estimate."""
    memory = memory_needed(config, vocab_size, dtype, degrees, layout)
    line = f"memory      about {_gib(memory.total)} per rank at its peak"
    free = machine.free_memory(device)
    if free is not None:
        where = "on this GPU" if device.type == "cuda" else "on this machine, for all its ranks"
        line += f"; {_gib(free)} are free {where}"
    return [line, *(f"            {part}" for part in memory_table(memory, device, dtype))]


def memory_table(memory: Memory, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A line for each part of the memory, and on a GPU one for what the parts do not include."""
    names = {
        "state": "weights and optimizer state",
        "gradients": "gradients",
        "weights": f"weights gathered or cast, {dtype_name(dtype)}",
        "activations": "activations",
        "workspace": f"workspace: {memory.phase}",
        "exchange": "rows exchanged between ranks",
    }
    lines = [f"{names[part]:34} {_gib(size):>12}" for part, size in memory.items().items()]
    if device.type == "cuda":
        lines.append(f"not counted by torch's allocator: {OUTSIDE_ALLOCATOR}")
    return lines


def checkpoint_line(config: Config, parameters: int, world: World) -> str:
    """The size of a checkpoint, how many are kept, and the memory that an asynchronous save uses."""
    size = bytes_per_weight(config.train) * parameters
    line = f"checkpoint  about {_gib(size)} on disk, the newest {config.checkpoint.keep} are kept"
    if config.checkpoint.async_save:
        line += f"; staging uses {_gib(size // world.size)} of host memory per rank"
    return line


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
