"""How tensors are compared and timed."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def relative(value: Tensor, reference: Tensor) -> float:
    """The norm of the difference over the norm of the reference, in fp64."""
    reference = reference.detach().double()
    value = value.detach().double().to(reference.device)
    if not reference.numel():
        return 0.0
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))


def worst(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest `relative` among tensors of one name, and that name; infinite if one side lacks a tensor."""
    if missing := set(references) ^ set(values):
        return float("inf"), min(missing)
    return max((relative(values[name], references[name]), name) for name in references)


def median(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> float:
    """The median of `relative` over the tensors: unlike the largest, not a matter of a few experts' rows."""
    return statistics.median(relative(values[name], references[name]) for name in references)


def gain(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> float:
    """By how much all values together are too long or too short along the reference: a factor too much shows here."""
    along = sum(float((values[name].double() * references[name].double()).sum()) for name in references)
    return abs(along / max(sum(float(r.double().square().sum()) for r in references.values()), 1e-30) - 1)


def relative_change(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1e-30)


def poison_memory(device: torch.device) -> None:
    """Leave NaN in the memory that the allocator hands out next: what is read without being written then shows."""
    if device.type == "cuda":
        sizes = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26)
        blocks = [torch.full((n,), float("nan"), device=device) for n in sizes for _ in range(3)]
        torch.cuda.synchronize()
        del blocks


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The mean of `repeats` calls after one to warm up."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / repeats
