"""One rank of the part `ranks`: some training steps with one layout. Rank 0 writes the figures to a file.

torchrun ... -m tests.gpu.check.ranks_worker OUT.json CONFIG [section.key=value ...]
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.gpu.check import project
from tests.gpu.check.compare import synchronize
from tests.gpu.check.speed import kernel_figures

WARM_UP, STEPS, MICRO_BATCHES = 2, 3, 4


def main(out: str, config_path: str, *settings: str) -> int:
    config = project.read_config(config_path, settings)
    with project.world_of_ranks(config) as (world, device, _, mesh):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = project.build_model(config, config.data.vocab_size, device, dtype, mesh)
        optimizer = project.make_optimizer(model, config.train)
        results, seconds = [], []
        for number in range(WARM_UP + STEPS):
            start = time.perf_counter()
            results.append(_step(model, optimizer, config, number, world.rank, device))
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        figures = _figures(config, world.size, min(seconds[WARM_UP:]), device)
        figures |= {"losses": [loss for loss, _ in results], "norm": results[0][1]}
        if world.rank == 0:  # written before the profiler runs, which may crash
            Path(out).write_text(json.dumps(figures))
        if device.type == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                _step(model, optimizer, config, 0, world.rank, device)
                synchronize(device)
            if world.rank == 0:
                Path(out).write_text(json.dumps(figures | kernel_figures(profiler.key_averages())))
    return 0


def _step(
    model: project.Transformer,
    optimizer: torch.optim.Optimizer,
    config: project.Config,
    number: int,
    rank: int,
    device: torch.device,
) -> tuple[float, float]:
    """One optimizer step. Returns the mean loss over all ranks and the norm of the gradients."""
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in range(MICRO_BATCHES):
        batch = _batch(config, number, micro_batch, rank).to(device)
        torch.manual_seed(1000 * number + 10 * micro_batch + rank)  # attention's dropout
        project.set_gradient_sync(model, micro_batch == MICRO_BATCHES - 1)
        summed, _ = project.forward(model, config, batch)
        tokens = MICRO_BATCHES * batch.tokens.numel()
        (summed / tokens).backward()
        loss += summed.detach().double() / tokens
    return project.finish_step(model, optimizer, config, loss)


def _batch(config: project.Config, number: int, micro_batch: int, rank: int) -> project.Batch:
    """The micro-batch of a rank. It does not depend on the layout."""
    rows, length = config.train.micro_batch_size, config.data.seq_len
    seed = (number * MICRO_BATCHES + micro_batch) * 4096 + rank
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.data.vocab_size, (rows, length + 1), generator=generator)
    keys = project.sequence_keys(0, number, torch.arange(rows) + seed * rows)
    return project.Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), keys)


def _figures(config: project.Config, ranks: int, seconds: float, device: torch.device) -> dict[str, Any]:
    rows = MICRO_BATCHES * config.train.micro_batch_size
    peak = project.peak_flops(device, torch.bfloat16)
    figures: dict[str, Any] = {
        "ranks": ranks,
        "tokens_per_second": ranks * rows * config.data.seq_len / seconds,
        "mfu": project.flops(config, config.data.vocab_size, rows) / seconds / peak if peak else None,
        "step_ms": 1e3 * seconds,
    }
    if device.type == "cuda":
        figures["peak_gib"] = project.largest_over_ranks(torch.cuda.max_memory_allocated() / 2**30, device)
    return figures


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
