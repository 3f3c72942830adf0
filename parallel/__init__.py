"""Distributes one model over many processes: meshes, FSDP2, expert parallelism, recomputation, and gradients."""
