"""The processes of a run, the degrees of parallelism, and the device mesh that the processes form.

There are two meshes over the same ranks. `dense` has the dimensions (replicate, shard); dense weights are sharded over
`shard`. `sparse` splits `shard` into (expert_shard, expert); consecutive ranks are neighbors in `expert`. The experts
are distributed over the ranks of `expert`, and each expert is sharded over `expert_shard`. `replicate` holds copies of
both. Degrees that are not possible raise a MeshError of one line before any process group is created.
"""

import os
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.config import ModelConfig
from parallel.experts import ExpertPlacement

MAX_PADDING_RATIO = 1.10  # expert slots over experts; above this `padding_warning` returns a line


class MeshError(ValueError):
    """The degrees of parallelism do not fit the processes or the model. The message is one line that names a fix."""


@dataclass(frozen=True)
class World:
    """The rank of this process, and the number of processes that torchrun started (one without torchrun)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "World":
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )


@dataclass(frozen=True)
class Degrees:
    """Degrees of parallelism. There are replicate * shard processes; `expert` divides `shard`."""

    replicate: int
    shard: int
    expert: int

    @property
    def expert_shard(self) -> int:
        """The number of ranks over which each expert is sharded."""
        return self.shard // self.expert


def resolve_degrees(world: World, model: ModelConfig, replicate: int, shard: int | str, expert: int | str) -> Degrees:
    """The degrees that the settings of the section `parallel` ask for, with `auto` replaced by a number.

    expert=auto is the largest degree inside one node that adds at most a tenth of the number of experts as padding
    slots. Raises MeshError unless replicate * shard is the number of processes and the degrees fit the model.
    """
    if world.size % replicate:
        raise MeshError(
            f"parallel.replicate={replicate}: does not divide the {world.size} processes of this run; "
            f"set it to {_any_of(_divisors(world.size))}"
        )
    ranks_per_replica = world.size // replicate
    if shard != "auto" and shard != ranks_per_replica:
        raise MeshError(
            f"parallel.shard={shard}: must be {ranks_per_replica}, the number of processes ({world.size}) divided "
            f"by parallel.replicate={replicate}; set it to {ranks_per_replica} or auto"
        )
    possible = expert_degrees(model, ranks_per_replica)
    if expert == "auto":
        inside_node = [
            degree
            for degree in possible
            if world.local_size % degree == 0
            and ExpertPlacement(model.n_experts, degree).padding_ratio <= MAX_PADDING_RATIO
        ]
        return Degrees(replicate, ranks_per_replica, max(inside_node, default=1))
    assert isinstance(expert, int)
    if expert > 1 and not model.moe_layers:
        raise MeshError(f"parallel.expert={expert}: the model has no experts (model.moe_every=0); set it to 1")
    if ranks_per_replica % expert:
        raise MeshError(
            f"parallel.expert={expert}: does not divide parallel.shard={ranks_per_replica}; "
            f"set it to {_any_of(possible)}"
        )
    if expert not in possible:
        raise MeshError(
            f"parallel.expert={expert}: each expert would be sharded over {ranks_per_replica // expert} ranks, which "
            f"divides neither model.dim={model.dim} nor model.expert_dim={model.expert_dim} evenly; "
            f"set it to {_any_of(possible)}"
        )
    return Degrees(replicate, ranks_per_replica, expert)


def expert_degrees(model: ModelConfig, shard: int) -> list[int]:
    """The possible values of parallel.expert: divisors of `shard` for which FSDP can shard each expert evenly.

    Even sharding needs one dimension of each of the experts' weights that shard / expert divides.
    """
    if not model.moe_layers:
        return [1]
    return [degree for degree in _divisors(shard) if degree == 1 or _shards_evenly(model, shard // degree)]


def _shards_evenly(model: ModelConfig, ranks: int) -> bool:
    """Whether `ranks` divides a dimension of each of the experts' weights."""
    gate_up, down = (model.dim, 2 * model.expert_dim), (model.expert_dim, model.dim)
    return all(any(size % ranks == 0 for size in shape) for shape in (gate_up, down))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _any_of(numbers: list[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def padding_warning(world: World, model: ModelConfig, chosen: Degrees) -> str | None:
    """A line to log if the degrees add more than a tenth of the number of experts as padding slots, else None.

    The line names the degree that expert=auto would choose.
    """
    placement = ExpertPlacement(model.n_experts, chosen.expert)
    if placement.padding_ratio <= MAX_PADDING_RATIO:
        return None
    better = resolve_degrees(world, model, chosen.replicate, chosen.shard, "auto").expert
    better_ratio = ExpertPlacement(model.n_experts, better).padding_ratio
    return (
        f"parallel.expert={chosen.expert}: {chosen.expert} ranks x {placement.slots} slots for {model.n_experts} "
        f"experts are {placement.padding_ratio - 1:.0%} more than needed; set parallel.expert={better} "
        f"to reduce this to {better_ratio - 1:.0%}"
    )


@dataclass(frozen=True)
class Mesh:
    """The meshes of a run over the same ranks.

    `dense` has the dimensions (replicate,) shard. `sparse` has (replicate,) expert_shard, expert; it is None if
    parallel.expert is 1.
    """

    degrees: Degrees
    dense: DeviceMesh
    sparse: DeviceMesh | None


def make_mesh(degrees: Degrees, device: torch.device) -> Mesh | None:
    """The meshes of a run; None for a single process, whose model FSDP does not wrap.

    With one replica the meshes have no dimension `replicate`: FSDP would run one more reduction over it, although it
    has a single rank.
    """
    if degrees.replicate * degrees.shard == 1:
        return None
    sizes: tuple[int, ...] = (degrees.shard,)
    names: tuple[str, ...] = ("shard",)
    if degrees.replicate > 1:
        sizes = (degrees.replicate, *sizes)
        names = ("replicate", *names)
    dense = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    if degrees.expert == 1:
        return Mesh(degrees, dense, None)
    shard_dim = len(names) - 1  # torch 2.11 does not accept the name of the dimension here
    sparse = dense._unflatten(shard_dim, (degrees.expert_shard, degrees.expert), ("expert_shard", "expert"))
    return Mesh(degrees, dense, sparse)
