"""Processes: who am I among how many, and the mesh (replicate, shard) they form.

What cannot be is refused here in one line, before any process group is made.
"""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class MeshError(ValueError):
    """Degrees of parallelism that do not fit the processes: one line that says what would."""


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started (alone without it)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "World":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0, 1), strict=True)))


def degrees(world: int, replicate: int, shard: int | str) -> tuple[int, int]:
    """(replicate, shard) with `auto` filled in. Raises MeshError unless they make up the world exactly."""
    if world % replicate:
        raise MeshError(f"parallel.replicate={replicate}: does not divide the {world} processes of this run")
    fits = world // replicate
    if shard != "auto" and shard != fits:
        raise MeshError(f"parallel.shard={shard}: {world} processes / parallel.replicate={replicate} leave {fits}")
    return replicate, fits


def connect(world: World, device: torch.device, timeout: int) -> None:
    """Join the process group of the run; `timeout` seconds without news from a rank end it. Alone: nothing."""
    if world.size == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cuda:nccl,cpu:gloo", timeout=datetime.timedelta(seconds=timeout), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))


def agree(value: bool) -> bool:
    """Rank 0's value, on all ranks: for what each might judge differently."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(int(value))
    dist.broadcast(box, 0)
    return bool(box)


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(world: World, device: torch.device, replicate: int, shard: int | str) -> DeviceMesh | None:
    """The mesh that the dense weights are sharded on; None for a single process, which is not wrapped.

    With one replica the mesh is one-dimensional: a second dimension of one rank would reduce once more.
    """
    replicate, shard_size = degrees(world.size, replicate, shard)
    if world.size == 1:
        return None
    if replicate == 1:
        return init_device_mesh(device.type, (shard_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, shard_size), mesh_dim_names=("replicate", "shard"))
