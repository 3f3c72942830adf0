"""After the backward: one message over all ranks, the global norm, and the clip.

The norm of sharded gradients, the loss, the experts' loads and the wish to stop travel in a single all-reduce, which
is also the one moment a step waits for the device and the other ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.fsdp import local


def local_gradients(model: nn.Module) -> list[Tensor]:
    """The parts of all gradients that lie on this rank."""
    return [local(p.grad) for p in model.parameters() if p.grad is not None]


def sum_of_squares(gradients: list[Tensor], replicate: int = 1) -> Tensor:
    """fp64 scalar; summed over all ranks it is the squared global norm. Not finite if any gradient is not."""
    parts = [g for g in gradients if g.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm(parts)).to(torch.float64)
    return norms.square().sum() / replicate


def sum_over_ranks(*parts: Tensor) -> list[Tensor]:
    """Sums of tensors over all ranks, in one message of fp64 (exact for integers below 2^53), on the CPU."""
    flat = torch.cat([p.detach().to(torch.float64).flatten() for p in parts])
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat = flat.cpu()
    return [s.view(p.shape) for s, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]


def scale(gradients: list[Tensor], factor: float) -> None:
    """Multiply the gradients in place."""
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
