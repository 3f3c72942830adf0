"""A model on this process: built on the meta device, sharded, and then filled in place.

If parallel.shard is above 1, no process ever holds the whole model.
"""

import torch

from model.config import ModelConfig
from model.moe import Experts
from model.transformer import Transformer
from parallel.compile import compile_parts
from parallel.experts import ExpertPlacement, distribute, parameter_as_global_dtensor
from parallel.fsdp import shard, to_local, to_local_with_window
from parallel.mesh import Mesh
from parallel.recompute import recompute_parts


def build_model(
    config: ModelConfig,
    vocab_size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None,
    overlap: bool = True,
    recompute: str = "none",
    compile: bool = False,
) -> Transformer:
    """This process's shards of the model, with its initial weights (fp32).

    Args:
        dtype: that of the activations.
        mesh: the processes that share the model; None for a single process.
        overlap: whether the exchange of rows overlaps with the shared expert (parallel.overlap).
        recompute: train.recompute: none, selective or full.
        compile: train.compile.
    """
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    model.compute_dtype = dtype
    if compile:
        compile_parts(model)
    recompute_parts(model, recompute)
    if mesh is not None:
        if mesh.sparse is not None:
            distribute(model, ExpertPlacement(config.n_experts, mesh.degrees.expert), mesh.sparse, overlap)
        shard(model, mesh, dtype)
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, Experts):
            for weight in module.parameters():
                to_local(weight).zero_()  # slots without an expert keep these zeros
    model.init_weights(
        seed, lambda name, parameter: to_local_with_window(parameter_as_global_dtensor(model, name, parameter))
    )
    return model
