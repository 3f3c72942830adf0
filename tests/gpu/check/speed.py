"""Measures a micro-batch of launch/scout.yaml on one GPU in several variants: its time by kernel, and its memory."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.gpu.check import project
from tests.gpu.check.compare import synchronize
from tests.gpu.check.runner import Check

NO_DROPOUT = ["model.dropout=0", "model.attention_dropout=0"]
WARM_UP, STEPS = 3, 5
CASE_S = 30  # a guess for one variant, compiling included


@dataclass(frozen=True)
class Variant:
    """Settings on top of launch/scout.yaml, and whether cuDNN's attention is allowed."""

    settings: list[str] = field(default_factory=list)
    cudnn: bool = True


VARIANTS = {
    "base": Variant(),
    "no dropout": Variant(NO_DROPOUT),
    "no dropout, no cuDNN": Variant(NO_DROPOUT, cudnn=False),
    "uncompiled": Variant(["train.compile=false"]),
    "liger": Variant(["train.liger=true"]),
    "uncompiled, liger": Variant(["train.compile=false", "train.liger=true"]),
    "recompute=full": Variant(["train.recompute=full"]),
}


def run(check: Check) -> None:
    """The part `speed`."""
    _each_variant(check, _measure)


def run_kernels(check: Check) -> None:
    """The part `kernels`. It is not in the part `speed`, whose figures would be lost if the profiler crashed."""
    _each_variant(check, _profile)


def _each_variant(check: Check, run: Callable[[Check, str, Variant], None]) -> None:
    for name, variant in VARIANTS.items():
        check.case(name, partial(run, check, name, variant), seconds=CASE_S)
        gc.collect()
        torch.cuda.empty_cache()


def _measure(check: Check, name: str, variant: Variant) -> None:
    config = project.read_config(project.SCOUT, variant.settings)
    with cudnn_attention(variant.cudnn):
        step, optimizer_step = _make_steps(config, check.device)
        torch.cuda.reset_peak_memory_stats()
        with project.weights_unchanged():  # as in the micro-batches of a step
            loss = [float(step()) for _ in range(WARM_UP)][-1]
            host, wall = _host_and_wall(step, check.device)
        optimizer_s = _seconds(optimizer_step, check.device)
    rows, vocab_size = config.train.micro_batch_size, config.data.vocab_size
    peak = project.peak_flops(check.device, torch.bfloat16)
    check.report.check(
        # Weights are random, so the loss per token is a little more than log(vocabulary), that of a uniform guess.
        name,
        {"loss": (math.log(vocab_size) - 0.5, math.log(vocab_size) + 2)},
        tokens_per_second=rows * config.data.seq_len / wall,
        mfu=project.flops(config, vocab_size, rows) / wall / peak if peak else None,
        wall_ms=1e3 * wall,
        host_ms=1e3 * host,
        optimizer_ms=1e3 * optimizer_s,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        loss=loss,
    )


def _make_steps(
    config: project.Config, device: torch.device
) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    """Two functions: forward and backward of one micro-batch, returning the loss per token; the optimizer's step."""
    rows, length, vocab = config.train.micro_batch_size, config.data.seq_len, config.data.vocab_size
    model = project.build_model(config, vocab, device, torch.bfloat16, exact_weights=False)
    if config.train.liger:
        loss, why = project.liger_loss(device)
        if loss is None:
            raise RuntimeError(why)
        project.use_loss(model, loss)
    optimizer = project.make_optimizer(model, config.train)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    keys = project.sequence_keys(0, 0, torch.arange(rows))
    batch = project.Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), keys).to(device)

    def step() -> torch.Tensor:
        loss, _ = project.forward(model, config, batch)
        loss = loss / batch.tokens.numel()
        loss.backward()
        return loss.detach()

    return step, optimizer.step


def _host_and_wall(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of a step until the host has launched all of it, and until the device has completed it."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    host = time.perf_counter() - start
    synchronize(device)
    return host / STEPS, (time.perf_counter() - start) / STEPS


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call, because the first call creates the optimizer's state."""
    seconds = 0.0
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds = time.perf_counter() - start
    return seconds


def _profile(check: Check, name: str, variant: Variant) -> None:
    """Busy time of the device and number of kernels in one step. A table of kernels by time is written to a file."""
    with cudnn_attention(variant.cudnn):
        step, _ = _make_steps(project.read_config(project.SCOUT, variant.settings), check.device)
        step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            synchronize(check.device)
    averages = profiler.key_averages()
    text = averages.table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=100)
    table = f"kernels-{name.replace(', ', '-').replace(' ', '-')}.txt"
    (check.options.out / table).write_text(text, encoding="utf-8")
    check.report.measure(name, **kernel_figures(averages), table=table)


def kernel_figures(averages: Iterable[Any]) -> dict[str, float]:
    """Time and number of the kernels in a profile's averages, and separately the time of NCCL's kernels."""
    on_device = [event for event in averages if event.device_type == DeviceType.CUDA]
    nccl = [event for event in on_device if "nccl" in event.key.lower()]
    exchange = [event for event in nccl if "sendrecv" in event.key.lower()]

    def ms(events: list[Any]) -> float:
        return float(sum(event.self_device_time_total for event in events)) / 1e3

    figures = {"busy_ms": ms(on_device), "kernels": sum(event.count for event in on_device)}
    if nccl:  # their time includes waiting for other ranks
        figures |= {"exchange_ms": ms(exchange), "other_nccl_ms": ms(nccl) - ms(exchange)}
    return figures


@contextmanager
def cudnn_attention(enabled: bool) -> Iterator[None]:
    """Allow or forbid cuDNN's attention inside the `with` block."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled and before)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
