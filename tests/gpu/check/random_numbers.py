"""Random numbers by position: dropout's masks and the router's noise must be those of the CPU, bit for bit.

A run whose masks depended on the device would lose what the project promises: the same loss wherever it is resumed.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.gpu.check import project
from tests.gpu.check.report import at_most, exactly
from tests.gpu.check.runner import Check

SITES = (0, 1, 2)
SHAPE = (5, 257, 96)  # not a multiple of what a kernel takes at a time


def run(check: Check) -> None:
    check.case("bits", lambda: _bits(check))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        check.case(f"dropout, {name}", partial(_dropout, check, name, dtype, project.dropout))
    check.case(
        "dropout, compiled", partial(_dropout, check, "compiled", torch.bfloat16, torch.compile(project.dropout))
    )
    check.case("noise", lambda: _noise(check))


def keys() -> Tensor:
    """Of five sequences, among them an index beyond 32 bits."""
    return project.sequence_keys(7, 123_456, torch.tensor([0, 1, 2, 1 << 20, (1 << 40) + 3]))


def _bits(check: Check) -> None:
    """Keys, keys made of keys, and the random bytes."""
    device = check.device
    index = torch.tensor([0, 1, 2, 1 << 20, (1 << 40) + 3])
    made_there = project.sequence_keys(7, 123_456, index.to(device)).cpu()
    folded = project.fold(keys().to(device), 9).cpu()
    count = 10_001
    many = project.random_bytes(keys().to(device), count).cpu()
    different = {
        "different_keys": int((made_there != keys()).sum() + (folded != project.fold(keys(), 9)).sum()),
        "different_bytes": int((many != project.random_bytes(keys(), count)).sum()),
    }
    check.report.check("bits", dict.fromkeys(different, exactly(0)), **different)


def _dropout(check: Check, name: str, dtype: torch.dtype, dropout: Callable[..., Tensor]) -> None:
    """Where dropout sets zeros, forward and backward; and that the rest is scaled by one factor."""
    wrong_masks, wrong_values = 0, 0
    x = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).abs() + 0.5).to(dtype)  # no zeros of its own
    for site in SITES:
        expected = _dropped(x, site, project.dropout)
        found = _dropped(x.to(check.device), site, dropout)
        for theirs, ours in zip(found, expected, strict=True):
            wrong_masks += int(((theirs.cpu() == 0) != (ours == 0)).sum())
            wrong_values += int((theirs.cpu() != ours).sum())
    share = float((_dropped(x, 0, project.dropout)[0] == 0).float().mean())
    # One product by a constant, rounded once: the CPU and the GPU round alike.
    limits = {"wrong_masks": exactly(0), "wrong_values": exactly(0), "share": (0.09, 0.11)}
    check.report.check(f"dropout, {name}", limits, wrong_masks=wrong_masks, wrong_values=wrong_values, share=share)


def _dropped(x: Tensor, site: int, dropout: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The result of dropout, and the gradient of its sum."""
    x = x.detach().clone().requires_grad_()
    out = dropout(x, 0.1, project.fold(keys(), site).to(x.device))
    out.sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def _noise(check: Check) -> None:
    """The bits are the same; logarithm and cosine of a GPU may differ from those of a CPU by an ulp."""
    count = 4096
    found = project.normal(keys().to(check.device), count).cpu()
    difference = float((found - project.normal(keys(), count)).abs().max())
    # Values up to 6, each the product of two functions that are off by at most two ulps of 1: 6 * 4 * 6e-8.
    check.report.check("noise", {"difference": at_most(1.5e-6)}, difference=difference)
