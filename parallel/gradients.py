"""What happens to the gradients between the backward and the optimizer: sums over ranks, the global norm, and the clip.

First the gradients of the routers are summed over all ranks, because FSDP ignores the routers. Then `trainer/step.py`
sends the sum of squares of this rank's gradients, the loss, the loads of the experts, the routers' statistics, and the
flags for stop, requeue and checkpoint-ready in a single all-reduce. At the end of the backward this is the only wait
for the device and the other ranks. In the forward the host also waits once in each MoE layer if parallel.expert is
above 1 or `grouped_mm` has no kernel, and the auxiliary loss needs one more all-reduce.
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
    sums = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [total.view_as(g) for total, g in zip(sums, gradients, strict=True)])


def sum_of_squares(model: nn.Module, replicate: int = 1) -> Tensor:
    """This rank's summand of the squared global norm of the gradients: an fp64 scalar, to be summed over all ranks.

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
    nonempty = [g for g in gradients if g.numel()]
    if not nonempty:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm(nonempty)).to(torch.float64)
    return norms.square().sum()


def scale(gradients: list[Tensor], factor: float) -> None:
    """Multiply the gradients by `factor` in place."""
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
