"""Processes: who am I among how many, and the mesh they form.

One root mesh (replicate, rest, expert), neighbours in `expert`. Dense weights are sharded over `shard` = rest x expert
and copied over `replicate`; experts live on the ranks of `expert`, each rank's sharded over `rest`, and copied alike.
What cannot be is refused here in one line, before any process group is made.
"""

import os
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.config import ModelConfig
from parallel.experts import ExpertPlacement

MAX_PADDING_RATIO = 1.10  # slots over experts that are accepted without a word


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


@dataclass(frozen=True)
class Degrees:
    """Degrees of parallelism: replicate * shard processes; `expert` divides `shard`."""

    replicate: int
    shard: int
    expert: int

    @property
    def expert_shard(self) -> int:
        return self.shard // self.expert


def degrees(world: World, model: ModelConfig, replicate: int, shard: int | str, expert: int | str) -> Degrees:
    """The degrees with `auto` filled in. Raises MeshError unless they make up the world exactly and fit the model.

    expert=auto is the largest degree inside one node that wastes at most a tenth of the slots.
    """
    if world.size % replicate:
        raise MeshError(f"parallel.replicate={replicate}: does not divide the {world.size} processes of this run")
    fits = world.size // replicate
    if shard != "auto" and shard != fits:
        raise MeshError(f"parallel.shard={shard}: {world.size} processes / parallel.replicate={replicate} leave {fits}")
    possible = expert_degrees(model, fits)
    if expert == "auto":
        inside = [
            e
            for e in possible
            if world.local_size % e == 0 and ExpertPlacement(model.n_experts, e).padding_ratio <= MAX_PADDING_RATIO
        ]
        return Degrees(replicate, fits, max(inside, default=1))
    assert isinstance(expert, int)
    if expert > 1 and not model.moe_layers:
        raise MeshError(f"parallel.expert={expert}: the model has no experts (model.moe_every=0); set it to 1")
    if fits % expert:
        raise MeshError(f"parallel.expert={expert}: does not divide parallel.shard={fits}; {_either(possible)} would")
    if expert not in possible:
        raise MeshError(
            f"parallel.expert={expert}: model.dim={model.dim} and model.expert_dim={model.expert_dim} do not divide "
            f"into the {fits // expert} ranks that are left to shard each expert; {_either(possible)} would do"
        )
    return Degrees(replicate, fits, expert)


def expert_degrees(model: ModelConfig, shard: int) -> list[int]:
    """Degrees that can be: divisors of `shard` whose rest divides a dimension of each of the experts' weights."""
    divisors = [e for e in range(1, shard + 1) if shard % e == 0]
    if not model.moe_layers:
        return [1]
    return [e for e in divisors if e == 1 or all(any(n % (shard // e) == 0 for n in s) for s in _sizes(model))]


def _sizes(model: ModelConfig) -> list[tuple[int, int]]:
    return [(model.dim, 2 * model.expert_dim), (model.expert_dim, model.dim)]  # gate_up and down


def advice(world: World, model: ModelConfig, chosen: Degrees) -> str | None:
    """A line for degrees that leave more than a tenth of the experts' slots dead, with the better degree."""
    owners = ExpertPlacement(model.n_experts, chosen.expert)
    if owners.padding_ratio <= MAX_PADDING_RATIO:
        return None
    better = degrees(world, model, chosen.replicate, chosen.shard, "auto").expert
    return (
        f"parallel.expert={chosen.expert}: {owners.slots} slots on each rank for {model.n_experts} experts are "
        f"{owners.padding_ratio - 1:.0%} more than needed; parallel.expert={better} would waste "
        f"{ExpertPlacement(model.n_experts, better).padding_ratio - 1:.0%}"
    )


def _either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True)
class Mesh:
    """`dense` is (replicate,) shard, `sparse` the same ranks as (replicate,) rest, expert; None if expert is 1."""

    degrees: Degrees
    dense: DeviceMesh
    sparse: DeviceMesh | None


def make_mesh(degrees: Degrees, device: torch.device) -> Mesh | None:
    """The meshes of a run; None for a single process, which is not wrapped.

    With one replica there is no dimension for it: one of a single rank would reduce once more.
    """
    if degrees.replicate * degrees.shard == 1:
        return None
    copies, copy_names = ((degrees.replicate,), ("replicate",)) if degrees.replicate > 1 else ((), ())
    dense = init_device_mesh(device.type, (*copies, degrees.shard), mesh_dim_names=(*copy_names, "shard"))
    if degrees.expert == 1:
        return Mesh(degrees, dense, None)
    # by its number: torch 2.11 refuses the name of the dimension
    return Mesh(
        degrees,
        dense,
        dense._unflatten(len(copies), (degrees.expert_shard, degrees.expert), ("expert_shard", "expert")),
    )
