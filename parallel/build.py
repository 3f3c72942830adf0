"""One model -> its part on this process: built on the meta device, sharded, then filled in place.

No process ever holds the whole model.
"""

import torch

from model.config import ModelConfig
from model.moe import Experts
from model.transformer import Transformer
from parallel.compile import compile_parts
from parallel.experts import ExpertPlacement, as_global_dtensor, distribute
from parallel.fsdp import shard, to_local, to_local_with_window
from parallel.mesh import Mesh
from parallel.recompute import recompute


def build_model(
    config: ModelConfig,
    vocab_size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None,
    overlap: bool = True,
    again: str = "none",
    compiled: bool = False,
) -> Transformer:
    """The model with its initial weights (fp32), computing in `dtype`, spread over `mesh` if there is one.

    overlap lets the exchange of rows run beside the shared expert; `again` is train.recompute, `compiled`
    train.compile.
    """
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    model.compute_dtype = dtype
    if compiled:
        compile_parts(model)
    recompute(model, again)
    if mesh is not None:
        if mesh.sparse is not None:
            distribute(model, ExpertPlacement(config.n_experts, mesh.degrees.expert), mesh.sparse, overlap)
        shard(model, mesh, dtype)
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, Experts):
            for weight in module.parameters():
                to_local(weight).zero_()  # dead slots stay so
    model.init_weights(seed, lambda name, parameter: to_local_with_window(as_global_dtensor(model, name, parameter)))
    return model
