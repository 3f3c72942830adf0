"""Compares the model on the device with the model on the CPU in fp32: the loss, every gradient, the chosen experts.

Initial weights and dropout masks are the same on both, so only rounding and faults of kernels make a difference.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from tests.gpu.check import project
from tests.gpu.check.compare import (
    gain_error,
    median_relative_error,
    poison_memory,
    relative_change,
    worst_relative_error,
)
from tests.gpu.check.project import Batch, StepNumbers
from tests.gpu.check.report import Limit, at_most
from tests.gpu.check.runner import Check

VOCAB = 512


class Case(NamedTuple):
    """Settings on top of launch/tiny.yaml, and whether rows consist of several documents."""

    settings: list[str]
    documents: bool = False


CASES = {
    "dropout, top-2": Case(["model.dropout=0.1", "model.top_k=2"]),
    "documents": Case([], documents=True),  # FlexAttention on a GPU
    "chunks": Case(["model.attention_chunk=64"]),
    "chunks in documents": Case(["model.attention_chunk=64"], documents=True),
    "grouped queries": Case(["model.n_kv_heads=1"]),
}


class Variant(NamedTuple):
    """Another way to compute the same step, and limits for its difference from the plain step on the same device."""

    recompute: str
    compile: bool
    limits: dict[str, Limit]


def _limits(loss: float, worst: float, median: float, gain: float, moved: int) -> dict[str, Limit]:
    """Upper limits of the figures that `judge` records.

    loss: relative change. worst, median: of the gradients' relative errors. gain: see `compare.gain_error`. moved: the
    number of tokens that chose another expert, over all layers.
    """
    return {
        "loss": at_most(loss),
        "worst": at_most(worst),
        "median": at_most(median),
        "gain": at_most(gain),
        "moved": at_most(moved),
    }


# Limits for the difference from the CPU in fp32. If the router's input is rounded, another one of two near experts may
# be chosen, which moves a whole row of gradients. So the error of the worst tensor may exceed that of rounding alone.
# Measured on a CPU with the same cases, bf16: loss 1.7e-4, worst 0.23 (a router), median 0.047, gain 0.0016, moved 18
# of 2,136; fp16: 8.5e-6, 0.051, 0.0099, 1.4e-4, 2. The limits are about three times these values.
LIMITS: dict[torch.dtype, dict[str, Limit]] = {
    # Both in fp32: sums in another order differ by about 1e-6, and by a hundred times that if terms cancel. No choice
    # changes.
    torch.float32: _limits(loss=1e-5, worst=1e-3, median=1e-4, gain=1e-5, moved=0),
    torch.bfloat16: _limits(loss=6e-4, worst=0.6, median=0.13, gain=0.006, moved=60),
    torch.float16: _limits(loss=5e-5, worst=0.15, median=0.03, gain=0.001, moved=10),
}
# The same kernels run with the same inputs and choose the same experts. Only atomic additions (in the backward of fused
# attention) add in another order, and their sums are then rounded to bf16.
SAME_KERNELS = _limits(loss=1e-6, worst=0.02, median=0.01, gain=1e-3, moved=0)
# A fused kernel rounds fewer intermediate results: it differs from the plain kernels as much as bf16 from fp32.
FUSED_KERNELS = LIMITS[torch.bfloat16]
VARIANTS = {
    "recompute=selective": Variant("selective", False, SAME_KERNELS),
    "recompute=full": Variant("full", False, SAME_KERNELS),
    "compile": Variant("none", True, FUSED_KERNELS),
}


def run(check: Check) -> None:
    for name in CASES:
        check.case(name, partial(check_case, check, name), seconds=5)


def check_case(check: Check, name: str, dtypes: Sequence[torch.dtype] = tuple(LIMITS)) -> None:
    reference = numbers(CASES[name], torch.device("cpu"), torch.float32)
    plain: StepNumbers | None = None
    for dtype in dtypes:
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        found = numbers(CASES[name], check.device, dtype)
        plain = found if dtype == torch.bfloat16 else plain
        judge(check, label, found, reference, LIMITS[dtype])
    if plain is not None:
        for label, variant in VARIANTS.items():
            if variant.compile and not check.on_gpu:
                continue  # compiling for a CPU needs a minute, and tests/parallel covers it
            check.case(f"{name}, {label}", partial(_check_variant, check, name, label, variant, plain))


def _check_variant(check: Check, name: str, label: str, variant: Variant, plain: StepNumbers) -> None:
    found = numbers(CASES[name], check.device, torch.bfloat16, variant.recompute, variant.compile)
    judge(check, f"{name}, bfloat16, {label}", found, plain, variant.limits)


def judge(check: Check, label: str, found: StepNumbers, reference: StepNumbers, limits: dict[str, Limit]) -> bool:
    """Record a case: how far loss, gradients and loads are from the reference. Returns whether they pass the limits."""
    worst, tensor = worst_relative_error(found.gradients, reference.gradients)
    return check.report.check(
        label,
        limits,
        loss=relative_change(found.loss, reference.loss),
        worst=worst,
        tensor=tensor,
        median=median_relative_error(found.gradients, reference.gradients),
        gain=gain_error(found.gradients, reference.gradients),
        moved=int((found.loads - reference.loads).abs().sum()) // 2,
    )


def numbers(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    recompute: str = "none",
    compile: bool = False,
    mesh: project.Mesh | None = None,
) -> StepNumbers:
    """Loss, gradients and loads of one step of launch/tiny.yaml's model."""
    config = project.read_config(project.TINY, case.settings)
    model = project.build_model(config, VOCAB, device, dtype, mesh, recompute, compile)
    poison_memory(device)
    return project.step_numbers(model, config, batch(case.documents).to(device))


def batch(documents: bool) -> Batch:
    """Four rows of 256 tokens. Some targets are ignored, in the last row all of them."""
    rows, length = 4, 256
    tokens = torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, 200:] = project.IGNORE
    targets[3] = project.IGNORE
    keys = project.sequence_keys(0, 0, torch.arange(rows))
    if not documents:
        return Batch(tokens[:, :-1].contiguous(), targets, keys)
    lengths = torch.tensor([37, 64, 100, length])[:, None]
    positions = torch.arange(length)[None]
    return Batch(tokens[:, :-1].contiguous(), targets, keys, positions % lengths, positions // lengths)
