"""Defaults of environment variables that torch and NCCL read once: to be set before torch is imported.

What the user has set stays. docs/parallel.md says what each is for.
"""

import os
import platform

DEFAULTS = {
    # Collectives of different communicators overlap here (FSDP, the exchange of rows, the step's message). NCCL may
    # deadlock if two ranks launch them in different orders on the device; from NCCL 2.26 on this keeps one order.
    "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
    # Hides C++ warnings that ask nothing of the user: one a rank for each mesh, since Gloo takes no options of NCCL.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def set_defaults() -> None:
    """Set what the user has not set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the new name and the old one of the same setting
    if not any(name in os.environ for name in names) and segments_can_grow(platform.release()):
        # the number of rows that an expert gets changes in each step, which fragments segments of a fixed size
        os.environ[names[0]] = "expandable_segments:True"
    # Inductor would start up to 32 processes for each rank, each with a torch of its own, for a dozen small kernels.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(compile_processes(os.cpu_count() or 1)))


def compile_processes(cores: int) -> int:
    """Processes that compile kernels for this rank: its share of the cores, at most eight."""
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(8, cores // max(1, int(local_ranks) if local_ranks.isdigit() else 1)))


def segments_can_grow(kernel: str) -> bool:
    """Not on WSL, by the name of its kernel: the first CUDA allocation fails there (pytorch/pytorch#192330)."""
    return "microsoft" not in kernel.lower()
