"""Collective operations that every rank calls together: messages of Python objects, and sums of tensors.

The trainer uses them to agree on decisions and to add up statistics. `group` is the process group that carries the
message, the default group if it is None. A single process sends no message: each function then returns its own value.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The rank of this process in the process group; 0 if there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value, on all ranks: for a decision that ranks could make differently, or that only rank 0 can make."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0, group)
    return box[0]


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks by rank, on rank 0; an empty list on every other rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(value, values, 0, group)
    return values or []


def scatter(values: list[Any], group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's `values[rank]` on each rank. The other ranks' `values` are ignored."""
    if not dist.is_initialized():
        return values[0]
    box = [None]
    dist.scatter_object_list(box, values if rank() == 0 else None, 0, group)
    return box[0]


def first_error(error: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The error of the lowest rank that has one, on all ranks; None if no rank has one."""
    errors = [each for each in gather(error, group) if each is not None]
    return broadcast(errors[0] if errors else None, group)


def sum_over_ranks(*tensors: Tensor) -> list[Tensor]:
    """Sums of tensors over all ranks, in fp64 on the CPU, by one all-reduce. Exact for integers below 2^53."""
    flat = torch.cat([t.detach().to(torch.float64).flatten() for t in tensors])
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat = flat.cpu()
    return [s.view(t.shape) for s, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
