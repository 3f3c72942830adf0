"""What happens to the gradients between the backward and the optimizer: sums over ranks, the global norm, and the clip.

First the gradients of the routers are summed over all ranks, because FSDP ignores the routers. Then `trainer/step.py`
sends the sum of squares of this rank's gradients, the loss, the loads of the experts and the stop flag in a single
all-reduce. That is the only moment at which a step waits for the device and for the other ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.fsdp import replicated_parameters, to_local


def local_gradients(model: nn.Module) -> list[Tensor]:
    """This rank's shard of each gradient."""
    return [to_local(p.grad) for p in model.parameters() if p.grad is not None]


def sum_replicated(model: nn.Module) -> None:
    """Sum the gradients that FSDP does not reduce over all ranks, by one all-reduce. Changes them in place."""
    gradients = [p.grad for p in replicated_parameters(model) if p.grad is not None]
    if not gradients or not dist.is_initialized():
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def sum_of_squares(model: nn.Module, replicate: int = 1) -> Tensor:
    """This rank's part of the squared global norm of the gradients: an fp64 scalar, to be summed over all ranks.

    A gradient that several ranks hold is divided by their number. The sum is not finite if any gradient is not finite.
    """
    if not dist.is_initialized():
        return _sum_of_squares(local_gradients(model))
    replicated_ids = {id(p) for p in replicated_parameters(model)}
    sharded: list[Tensor] = []
    replicated: list[Tensor] = []
    for p in model.parameters():
        if p.grad is not None:
            (replicated if id(p) in replicated_ids else sharded).append(to_local(p.grad))
    return _sum_of_squares(sharded) / replicate + _sum_of_squares(replicated) / dist.get_world_size()


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    parts = [g for g in gradients if g.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm(parts)).to(torch.float64)
    return norms.square().sum()


def scale(gradients: list[Tensor], factor: float) -> None:
    """Multiply the gradients by `factor` in place."""
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
