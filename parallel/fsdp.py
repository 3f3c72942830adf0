"""Dense weights over many processes with FSDP2, from outside the model.

Units are each block, the head, and the root with the embedding; a small model is one unit. FSDP ignores the routers:
they are small, stay in fp32 because near ties would flip otherwise, and each rank has them whole (`replicated`). With
expert parallelism the experts of a layer are a unit of their own over the ranks that shard them; FSDP ignores them if
no other rank holds the same experts. Gradients are plain sums over the ranks, since the loss is already divided by the
count of all tokens.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.moe import Experts, MoE, Router
from model.random import Window
from model.transformer import Transformer
from parallel.mesh import Mesh

SMALL = 1 << 26  # bytes of weights up to which a model is gathered and reduced as one: messages cost more than waiting


def shard(model: Transformer, mesh: Mesh, dtype: torch.dtype) -> None:
    def policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
        wide = torch.promote_types(dtype, torch.float32)
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    ignored = set(replicated(model))
    if mesh.sparse is not None:
        ignored |= {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    dense: dict[str, Any] = {"mesh": mesh.dense, "mp_policy": policy(dtype), "ignored_params": ignored}
    for block in model.blocks:
        if isinstance(block.feed_forward, MoE):
            if mesh.sparse is not None and mesh.degrees.replicate * mesh.degrees.expert_shard > 1:
                names = tuple(n for n in mesh.sparse.mesh_dim_names or () if n != "expert")
                fully_shard(
                    block.feed_forward.experts,
                    mesh=mesh.sparse[names],
                    mp_policy=policy(dtype),
                    shard_placement_fn=lambda weight: _placement(weight, mesh.degrees.expert_shard),
                )
        if size > SMALL:
            fully_shard(block, **dense)
    if size > SMALL:  # the head's backward comes at once
        fully_shard(model.head, **dense, reshard_after_forward=False)
    fully_shard(model, **dense, reshard_after_forward=False)
    for module in _units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(model)


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """The weights that every rank has whole, and whose gradients FSDP does not reduce: those of the routers."""
    return [p for module in model.modules() if isinstance(module, Router) for p in module.parameters()]


def _prefetch(model: Transformer) -> None:
    """Have the weights of a block gathered while the one before it works, in the forward and in the backward.

    FSDP does so by itself in the order of the host's calls, but the host waits for the device inside of each MoE layer
    with expert parallelism, and would ask for the next block's weights too late.
    """
    units = [list(_units(block)) for block in model.blocks]  # of each block: itself, its experts
    if not isinstance(model.head, FSDPModule) or not isinstance(model, FSDPModule):
        return  # all is one unit
    for here, there in itertools.pairwise(units):
        here[0].set_modules_to_forward_prefetch(there)
        there[0].set_modules_to_backward_prefetch(here[::-1])
    model.set_modules_to_forward_prefetch(units[0])
    model.head.set_modules_to_backward_prefetch(units[-1][::-1])


def _placement(weight: Tensor, rest: int) -> Shard:
    """The first dimension of each expert's matrix that the ranks divide; `mesh.degrees` saw to it that there is one."""
    return next(Shard(d) for d in (1, 2) if weight.shape[d] % rest == 0)


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank; writes to it reach the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def window(tensor: Tensor) -> tuple[Tensor, Window]:
    """This rank's part of a tensor, and its window in the whole."""
    part = local(tensor)
    if not isinstance(tensor, DTensor):
        return part, [(0, n) for n in part.shape]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return part, [(o, o + n) for o, n in zip(offset, shape, strict=True)]


def reduce_gradients(model: Transformer, now: bool) -> None:
    """Whether the coming backward reduces its gradients over the ranks, or keeps the sum here."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


@contextmanager
def gathered(model: Transformer) -> Iterator[None]:
    """Keep all weights gathered over many forwards, as generation wants them, instead of once for each token."""
    for module in _units(model):
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in _units(model):
            module.reshard()
            module.set_reshard_after_forward(module not in (model, model.head), recurse=False)
