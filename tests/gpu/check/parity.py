"""The model on the device against the model on the CPU in fp32: loss, every gradient, and the experts chosen.

The initial weights and the dropout masks are the same on both, so what differs is rounding, and a fault of a kernel.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from tests.gpu.check import project
from tests.gpu.check.compare import gain, median, poison_memory, relative_change, worst
from tests.gpu.check.project import Batch, StepNumbers
from tests.gpu.check.report import Limit, at_most
from tests.gpu.check.runner import Check

VOCAB = 512


class Case(NamedTuple):
    words: list[str]
    documents: bool = False


CASES = {
    "dropout, top-2": Case(["model.dropout=0.1", "model.top_k=2"]),
    "documents": Case([], documents=True),  # FlexAttention on a GPU
    "chunks": Case(["model.attention_chunk=64"]),
    "chunks in documents": Case(["model.attention_chunk=64"], documents=True),
    "grouped queries": Case(["model.n_kv_heads=1"]),
}


class Variant(NamedTuple):
    """How the same step may be computed otherwise, and how far it may be from the plain one on the same device."""

    recompute: str
    compiled: bool
    limits: dict[str, Limit]


def _limits(loss: float, worst: float, median: float, gain: float, moved: int) -> dict[str, Limit]:
    """loss: relative change; worst, median: of the gradients' relative errors; gain: see `compare`; moved: tokens that
    went to another expert, over all layers."""
    return {
        "loss": at_most(loss),
        "worst": at_most(worst),
        "median": at_most(median),
        "gain": at_most(gain),
        "moved": at_most(moved),
    }


# Against the CPU in fp32. A rounded router's input can change which of two near experts is chosen, which moves a whole
# row of gradients: so the worst tensor may be further off than rounding alone. Measured on a CPU with the same cases,
# bf16: loss 1.7e-4, worst 0.23 (a router), median 0.047, gain 0.0016, moved 18 of 2,136;
# fp16: 8.5e-6, 0.051, 0.0099, 1.4e-4, 2. The limits are about three times that.
LIMITS: dict[torch.dtype, dict[str, Limit]] = {
    # Both in fp32: sums in another order, about 1e-6, and a hundred times that where terms cancel. No choice changes.
    torch.float32: _limits(loss=1e-5, worst=1e-3, median=1e-4, gain=1e-5, moved=0),
    torch.bfloat16: _limits(loss=6e-4, worst=0.6, median=0.13, gain=0.006, moved=60),
    torch.float16: _limits(loss=5e-5, worst=0.15, median=0.03, gain=0.001, moved=10),
}
# The same kernels run again on the same inputs and choose the same experts; only sums by atomic additions (the
# backward of fused attention) come in another order, and then are rounded to bf16.
AGAIN = _limits(loss=1e-6, worst=0.02, median=0.01, gain=1e-3, moved=0)
# A fused kernel rounds fewer intermediate results: as far from the plain one as bf16 is from fp32.
FUSED = LIMITS[torch.bfloat16]
VARIANTS = {
    "recompute=selective": Variant("selective", False, AGAIN),
    "recompute=full": Variant("full", False, AGAIN),
    "compile": Variant("none", True, FUSED),
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
            if variant.compiled and not check.on_gpu:
                continue  # compiled for a CPU it takes a minute, and tests/parallel has it
            check.case(f"{name}, {label}", partial(_check_variant, check, name, label, variant, plain))


def _check_variant(check: Check, name: str, label: str, variant: Variant, plain: StepNumbers) -> None:
    found = numbers(CASES[name], check.device, torch.bfloat16, variant.recompute, variant.compiled)
    judge(check, f"{name}, bfloat16, {label}", found, plain, variant.limits)


def judge(check: Check, label: str, found: StepNumbers, reference: StepNumbers, limits: dict[str, Limit]) -> bool:
    off, tensor = worst(found.gradients, reference.gradients)
    return check.report.check(
        label,
        limits,
        loss=relative_change(found.loss, reference.loss),
        worst=off,
        tensor=tensor,
        median=median(found.gradients, reference.gradients),
        gain=gain(found.gradients, reference.gradients),
        moved=int((found.loads - reference.loads).abs().sum()) // 2,
    )


def numbers(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    recompute: str = "none",
    compiled: bool = False,
    mesh: project.Mesh | None = None,
) -> StepNumbers:
    """Loss, gradients and loads of one step of launch/tiny.yaml's model."""
    config = project.read_config(project.TINY, case.words)
    model = project.build_model(config, VOCAB, device, dtype, mesh, recompute, compiled)
    poison_memory(device)
    return project.step_numbers(model, config, batch(case.documents).to(device))


def batch(documents: bool) -> Batch:
    """Four rows of 256 tokens, with targets that do not count and one whole row of them."""
    rows, length = 4, 256
    tokens = torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, 200:] = project.IGNORE
    targets[3] = project.IGNORE
    keys = project.sequence_keys(0, 0, torch.arange(rows))
    if not documents:
        return Batch(tokens[:, :-1].contiguous(), targets, keys)
    lengths = torch.tensor([37, 64, 100, length])[:, None]
    places = torch.arange(length)[None]
    return Batch(tokens[:, :-1].contiguous(), targets, keys, places % lengths, places // lengths)
