"""Compares tensors and measures times."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The norm of the difference over the norm of the reference, in fp64."""
    reference = reference.detach().double()
    value = value.detach().double().to(reference.device)
    if not reference.numel():
        return 0.0
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))


def worst_relative_error(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a tensor, and the name of that tensor; infinite if one side lacks a tensor."""
    if missing := set(references) ^ set(values):
        return float("inf"), min(missing)
    return max((relative_error(values[name], references[name]), name) for name in references)


def median_relative_error(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> float:
    """The median relative error of the tensors. Unlike the largest error it does not depend on a few experts' rows."""
    return statistics.median(relative_error(values[name], references[name]) for name in references)


def gain_error(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> float:
    """How far the factor is from 1 by which the projection of all values on the references exceeds the references.

    A wrong constant factor shows here, while random errors average out.
    """
    projection = sum(float((values[name].double() * references[name].double()).sum()) for name in references)
    square_norm = sum(float(reference.double().square().sum()) for reference in references.values())
    return abs(projection / max(square_norm, 1e-30) - 1)


def relative_change(value: float, reference: float) -> float:
    """The difference over the reference, both without their signs."""
    return abs(value - reference) / max(abs(reference), 1e-30)


def poison_memory(device: torch.device) -> None:
    """Leave NaN in the memory that the allocator allocates next, so that a read of unwritten memory is found."""
    if device.type == "cuda":
        sizes = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26)
        blocks = [torch.full((n,), float("nan"), device=device) for n in sizes for _ in range(3)]
        torch.cuda.synchronize()
        del blocks


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean milliseconds of `repeats` calls, after one call to warm up."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / repeats
