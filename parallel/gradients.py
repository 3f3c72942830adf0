"""After the backward: one message over all ranks, the global norm, and the clip.

The routers' gradients, which FSDP leaves alone, are summed first. Then the norm of the gradients, the loss, the
experts' loads and the wish to stop travel in a single all-reduce, which is also the one moment a step waits for the
device and the other ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.fsdp import local, replicated


def local_gradients(model: nn.Module) -> list[Tensor]:
    """The parts of all gradients that lie on this rank."""
    return [local(p.grad) for p in model.parameters() if p.grad is not None]


def sum_replicated(model: nn.Module) -> None:
    """Sum the gradients that FSDP leaves to each rank over all ranks, in one message."""
    gradients = [p.grad for p in replicated(model) if p.grad is not None]
    if not gradients or not dist.is_initialized():
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def sum_of_squares(model: nn.Module, replicate: int = 1) -> Tensor:
    """fp64 scalar; summed over all ranks it is the squared global norm. Not finite if any gradient is not."""
    if not dist.is_initialized():
        return _sum_of_squares(local_gradients(model))
    whole = {id(p) for p in replicated(model)}
    sharded: list[Tensor] = []
    copies: list[Tensor] = []
    for p in model.parameters():
        if p.grad is not None:
            (copies if id(p) in whole else sharded).append(local(p.grad))
    return _sum_of_squares(sharded) / replicate + _sum_of_squares(copies) / dist.get_world_size()


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    parts = [g for g in gradients if g.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm(parts)).to(torch.float64)
    return norms.square().sum()


def scale(gradients: list[Tensor], factor: float) -> None:
    """Multiply the gradients in place."""
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
