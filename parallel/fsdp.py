"""Shards the model over the ranks with FSDP2, without changes to the model's code.

Each block, the head, and the root with the embedding are FSDP units of their own; a small model is a single unit. FSDP
ignores the routers, so every rank holds their full weights (`replicated_parameters`): they are small, and they stay in
fp32 because near ties between experts would flip otherwise. With expert parallelism the experts of a layer are a unit
of their own over the ranks that shard them; FSDP ignores them if no other rank holds the same experts. Gradients are
plain sums over the ranks, since the loss is already divided by the number of all tokens.
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

# A model whose weights have at most this many bytes is a single FSDP unit: at that size more messages cost more time
# than the overlap of communication and computation saves.
ONE_UNIT_BYTES = 1 << 26


def shard(model: Transformer, mesh: Mesh, dtype: torch.dtype) -> None:
    """Apply `fully_shard` to the units of the model. Weights are gathered in `dtype`, gradients reduced in fp32.

    Experts must already be distributed over the ranks of `mesh.sparse` (see `experts.distribute`).
    """

    def policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
        reduce_dtype = torch.promote_types(dtype, torch.float32)  # fp64 stays fp64
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)

    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    is_one_unit = weight_bytes <= ONE_UNIT_BYTES
    ignored = set(replicated_parameters(model))
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
                    shard_placement_fn=lambda weight: _expert_placement(weight, mesh.degrees.expert_shard),
                )
        if not is_one_unit:
            fully_shard(block, **dense)
    if not is_one_unit:  # the head's backward follows its forward at once, so its weights stay gathered
        fully_shard(model.head, **dense, reshard_after_forward=False)
    fully_shard(model, **dense, reshard_after_forward=False)
    for module in _units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(model)


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that FSDP ignores, the routers': every rank holds them in full, and FSDP sums no gradients."""
    return [p for module in model.modules() if isinstance(module, Router) for p in module.parameters()]


def _prefetch(model: Transformer) -> None:
    """Gather the weights of a block while the block before it computes, in the forward and in the backward.

    By default FSDP gathers weights in the order in which the host calls the modules. With expert parallelism the host
    waits for the device inside each MoE layer, and would ask for the next block's weights too late.
    """
    units = [list(_units(block)) for block in model.blocks]  # for each block: the block itself, then its experts
    if not isinstance(model.head, FSDPModule) or not isinstance(model, FSDPModule):
        return  # the model is a single unit
    for previous, following in itertools.pairwise(units):
        previous[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(previous[::-1])
    model.set_modules_to_forward_prefetch(units[0])
    model.head.set_modules_to_backward_prefetch(units[-1][::-1])


def _expert_placement(weight: Tensor, expert_shard: int) -> Shard:
    """Shards weight (experts, in, out) on its first matrix dimension that `expert_shard` divides.

    There is one: `mesh.resolve_degrees` raises MeshError otherwise.
    """
    return next(Shard(dim) for dim in (1, 2) if weight.shape[dim] % expert_shard == 0)


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    """The FSDP units inside a module, the module itself included."""
    return (unit for unit in module.modules() if isinstance(unit, FSDPModule))


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, detached. It is a view: writes to it change the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_local_with_window(tensor: Tensor) -> tuple[Tensor, Window]:
    """This rank's shard of a tensor, and its window (start, stop) in each dimension of the full tensor."""
    local_shard = to_local(tensor)
    if not isinstance(tensor, DTensor):
        return local_shard, [(0, size) for size in local_shard.shape]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local_shard, [(start, start + size) for start, size in zip(offset, shape, strict=True)]


def set_gradient_sync(model: Transformer, enabled: bool) -> None:
    """Whether the next backward reduces gradients over the ranks, or only accumulates them on this rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


@contextmanager
def gathered(model: Transformer) -> Iterator[None]:
    """Keep all weights gathered inside the `with` block, over many forwards.

    Generation runs one forward for each token, and would gather all weights each time.
    """
    for module in _units(model):
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in _units(model):
            module.reshard()
            module.set_reshard_after_forward(module not in (model, model.head), recurse=False)
