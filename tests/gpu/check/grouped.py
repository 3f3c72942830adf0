"""Compares the grouped product of the experts with a loop in fp64.

The cases have groups without rows, no rows at all, rows beyond the last group, and memory that is full of NaN.
"""

from functools import partial

import torch
from torch import Tensor

from tests.gpu.check import project
from tests.gpu.check.compare import poison_memory, relative_error
from tests.gpu.check.report import at_most, exactly
from tests.gpu.check.runner import Check

# Operands are exact in bf16 and sums are fp32, so the only error comes from rounding a result to bf16: at most 2^-9 of
# a number, less in the norm. Twice that leaves room for sums in another order.
ROUNDING = at_most(2.0**-8)
Case = tuple[int, int, list[int], int]  # K, N, rows of each group, rows beyond the last group


def cases(on_gpu: bool) -> dict[str, Case]:
    small = {
        "an empty group, a group of one row": (64, 128, [5, 0, 100, 1], 7),
        "groups of one row": (64, 128, [1] * 31, 0),
        "all groups empty": (64, 128, [0, 0, 0, 0], 9),
        "no rows": (64, 128, [0, 0, 0, 0], 0),
        "one row in total": (64, 128, [0, 1, 0, 0], 0),
    }
    large = {
        "an empty group at a model's size": (768, 4096, [5, 0, 1000, 3], 7),
        "all rows in one group": (2048, 768, [0, 8192, 0, 0], 0),
        "equal groups": (768, 4096, [2048] * 4, 0),
    }
    return small | large if on_gpu else small


def run(check: Check) -> None:
    for name, case in cases(check.on_gpu).items():
        check.case(name, partial(_check, check, name, case))


def _check(check: Check, name: str, case: Case) -> None:
    k, n, sizes, beyond = case
    device, used = check.device, sum(sizes)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(used + beyond, k, generator=generator).bfloat16()
    weight = (torch.randn(len(sizes), k, n, generator=generator) * k**-0.5).bfloat16().float()
    upstream = torch.randn(used, n, generator=generator).bfloat16()
    poison_memory(device)
    out, to_rows, to_weight = _product(*(t.to(device) for t in (rows, weight, upstream, torch.tensor(sizes))))
    expected = _reference(rows[:used], weight, upstream, sizes)
    idle = [i for i, size in enumerate(sizes) if size == 0]
    figures = {
        "out": relative_error(out[:used], expected[0]),
        "to_rows": relative_error(to_rows[:used], expected[1]),
        "to_weight": relative_error(to_weight, expected[2]) if used else 0.0,
        "idle_gradient": float(to_weight[idle].abs().max()) if idle else 0.0,
    }
    # The gradient of an expert without rows must be zero, not the former content of the memory.
    limits = {"out": ROUNDING, "to_rows": ROUNDING, "to_weight": ROUNDING, "idle_gradient": exactly(0)}
    check.report.check(name, limits, **figures)


def _product(rows: Tensor, weight: Tensor, upstream: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The project's product, and its gradients of rows and weight."""
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    out = project.grouped_matmul(rows, weight, counts)
    (out[: len(upstream)].float() * upstream.float()).sum().backward()
    assert rows.grad is not None and weight.grad is not None
    return out, rows.grad, weight.grad


def _reference(rows: Tensor, weight: Tensor, upstream: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same three tensors, computed on the CPU by a loop in fp64."""
    rows, weight = rows.double().requires_grad_(), weight.double().requires_grad_()
    out = torch.cat([part @ w for part, w in zip(rows.split(sizes), weight, strict=True)])
    (out * upstream.double()).sum().backward()
    assert rows.grad is not None and weight.grad is not None
    return out, rows.grad, weight.grad
