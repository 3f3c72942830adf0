"""Random numbers by position: dropout's masks and the router's noise must equal those of the CPU bit by bit.

Otherwise a run that is resumed on another device would have another loss.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.gpu.check import project
from tests.gpu.check.report import at_most, exactly
from tests.gpu.check.runner import Check

SITES = (0, 1, 2)
SHAPE = (5, 257, 96)  # not a multiple of a block of a kernel


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
    """The keys of five sequences; the index of one needs more than 32 bits."""
    return project.sequence_keys(7, 123_456, torch.tensor([0, 1, 2, 1 << 20, (1 << 40) + 3]))


def _bits(check: Check) -> None:
    """Compare keys, keys derived from keys, and random bytes."""
    device = check.device
    index = torch.tensor([0, 1, 2, 1 << 20, (1 << 40) + 3])
    device_keys = project.sequence_keys(7, 123_456, index.to(device)).cpu()
    folded = project.fold(keys().to(device), 9).cpu()
    count = 10_001
    device_bytes = project.random_bytes(keys().to(device), count).cpu()
    different = {
        "different_keys": int((device_keys != keys()).sum() + (folded != project.fold(keys(), 9)).sum()),
        "different_bytes": int((device_bytes != project.random_bytes(keys(), count)).sum()),
    }
    check.report.check("bits", dict.fromkeys(different, exactly(0)), **different)


def _dropout(check: Check, name: str, dtype: torch.dtype, dropout: Callable[..., Tensor]) -> None:
    """Compare the zeros of dropout in forward and backward, and the values that are not zero."""
    wrong_masks, wrong_values = 0, 0
    x = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).abs() + 0.5).to(dtype)  # contains no zeros
    for site in SITES:
        expected = _apply_dropout(x, site, project.dropout)
        found = _apply_dropout(x.to(check.device), site, dropout)
        for on_device, on_cpu in zip(found, expected, strict=True):
            wrong_masks += int(((on_device.cpu() == 0) != (on_cpu == 0)).sum())
            wrong_values += int((on_device.cpu() != on_cpu).sum())
    share = float((_apply_dropout(x, 0, project.dropout)[0] == 0).float().mean())
    # Values are multiplied by a constant and rounded once, which gives the same result on a CPU and on a GPU.
    limits = {"wrong_masks": exactly(0), "wrong_values": exactly(0), "share": (0.09, 0.11)}
    check.report.check(f"dropout, {name}", limits, wrong_masks=wrong_masks, wrong_values=wrong_values, share=share)


def _apply_dropout(x: Tensor, site: int, dropout: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The result of dropout, and the gradient of its sum."""
    x = x.detach().clone().requires_grad_()
    out = dropout(x, 0.1, project.fold(keys(), site).to(x.device))
    out.sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def _noise(check: Check) -> None:
    """Compare normal noise. Its bits are equal, but logarithm and cosine of a GPU and a CPU may differ by an ulp."""
    count = 4096
    found = project.normal(keys().to(check.device), count).cpu()
    difference = float((found - project.normal(keys(), count)).abs().max())
    # Values are at most 6; each is the product of two functions with an error of at most two ulps of 1: 6 * 4 * 6e-8.
    check.report.check("noise", {"difference": at_most(1.5e-6)}, difference=difference)
