"""Defaults of environment variables that torch and NCCL read once, so that they must be set before torch is imported.

Variables that the user has set are not changed. docs/parallel.md explains each.
"""

import os
import platform

DEFAULTS = {
    # Collectives of different communicators overlap here (FSDP, the exchange of rows, the all-reduce of a step). NCCL
    # may deadlock if two ranks launch them in different orders on the device; from NCCL 2.26 on this keeps one order.
    "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
    # Hides C++ warnings that need no action: each rank prints one per mesh, because Gloo has no options like NCCL's.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def set_defaults() -> None:
    """Set the variables that the user has not set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    new_name, old_name = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # of the same setting
    is_set = new_name in os.environ or old_name in os.environ
    if not is_set and supports_expandable_segments(platform.release()):
        # the number of rows that an expert receives changes in each step, which fragments segments of a fixed size
        os.environ[new_name] = "expandable_segments:True"
    # Inductor would start up to 32 processes for each rank, and each would import torch, for a dozen small kernels.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(compile_processes(os.cpu_count() or 1)))


def compile_processes(cores: int) -> int:
    """The number of processes that compile kernels for this rank: its share of the cores, at most eight."""
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE", "1")
    local_ranks = max(1, int(local_world_size)) if local_world_size.isdigit() else 1
    return max(1, min(8, cores // local_ranks))


def supports_expandable_segments(kernel: str) -> bool:
    """False on WSL, by the name of its kernel: the first CUDA allocation fails there (pytorch/pytorch#192330)."""
    return "microsoft" not in kernel.lower()
