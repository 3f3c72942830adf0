"""One model -> many processes with FSDP2, from outside the model.

Built on the meta device, sharded, then filled in place: no process ever holds the whole. Units: each block, the head,
and the root with the embedding; a small model is one unit; under bf16 each router is one more, which stays fp32 or near
ties would flip. Gradients are plain sums over the ranks, since the loss is already divided by the count of all tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.config import ModelConfig
from model.moe import MoE
from model.random import Window
from model.transformer import Transformer

SMALL = 1 << 26  # bytes of weights up to which a model is gathered and reduced as one: messages cost more than waiting


def build(
    config: ModelConfig, vocab_size: int, seed: int, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None
) -> Transformer:
    """The model with its initial weights (fp32), computing in `dtype`, sharded over `mesh` if there is one."""
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    model.compute_dtype = dtype
    if mesh is not None:
        _shard(model, mesh, dtype)
    model.to_empty(device=device)
    model.init_weights(seed, _local)
    return model


def _shard(model: Transformer, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    small = sum(p.numel() * p.element_size() for p in model.parameters()) <= SMALL
    for block in model.blocks:
        if isinstance(block.feed_forward, MoE) and dtype != torch.float32:
            fully_shard(block.feed_forward.router, mesh=mesh, mp_policy=exact)
        if not small:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    if not small:  # the head's backward comes at once
        fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank; writes to it reach the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local(parameter: Tensor) -> tuple[Tensor, Window]:
    """This rank's part of a parameter, and its window in the whole."""
    part = local(parameter)
    if not isinstance(parameter, DTensor):
        return part, [(0, n) for n in parameter.shape]
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
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
