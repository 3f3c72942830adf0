"""Messages of all ranks: objects and sums. Each function is called on all ranks; a process alone sends none.

`group` is the process group that carries the message, the default one if it is None.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Of this process among those that are connected."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value, on all ranks: for what each might judge differently, or rank 0 alone can know."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0, group)
    return box[0]


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks on rank 0; elsewhere an empty list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(value, values, 0, group)
    return values or []


def scatter(values: list[Any], group: dist.ProcessGroup | None = None) -> Any:
    """To each rank its own of rank 0's values."""
    if not dist.is_initialized():
        return values[0]
    box = [None]
    dist.scatter_object_list(box, values if rank() == 0 else None, 0, group)
    return box[0]


def first_error(error: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The error of the lowest rank that has one, on all ranks; None if none has."""
    return broadcast(next((each for each in gather(error, group) if each is not None), None), group)


def sum_over_ranks(*parts: Tensor) -> list[Tensor]:
    """Sums of tensors over all ranks, in one message of fp64 (exact for integers below 2^53), on the CPU."""
    flat = torch.cat([p.detach().to(torch.float64).flatten() for p in parts])
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat = flat.cpu()
    return [s.view(p.shape) for s, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
