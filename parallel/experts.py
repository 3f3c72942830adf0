"""Experts over ranks: who owns which, and the all-to-all exchange that takes rows to them and back.

Each rank of the `expert` mesh has `slots` places for experts, so that all shapes are alike for any number of experts on
any number of ranks; places past the last expert are dead: zero, never routed to, never saved.

The way of a layer's rows (dropless, one message of counts and one of rows each way):
1. The router's loads, cut by owner, go to the owners, and with them come the counts of what will arrive here.
2. Rows, already in the order of experts, set out. The shared expert's first half runs meanwhile.
3. What arrived, in the order (source, slot), is regrouped to (slot, source) and meets its experts.
4. The results set out in the order in which they came. The shared expert's second half runs meanwhile.
5. They are home, each where its row was sent from.
In the backward autograd, which runs the newest nodes first, takes the same way from 5 to 2 with the gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from model.moe import MoE
from model.permute import sort_choices


@dataclass(frozen=True)
class ExpertPlacement:
    """Which rank owns which expert: `slots` each, in the order of torch.chunk (31 on 4 ranks: 8, 8, 8, 7)."""

    n_experts: int
    ranks: int

    @property
    def slots(self) -> int:
        """Places for experts on each rank."""
        return -(-self.n_experts // self.ranks)

    @property
    def padding_ratio(self) -> float:
        """Places over experts: also the busiest rank's share of the experts over the mean."""
        return self.slots * self.ranks / self.n_experts

    def owned(self, rank: int) -> int:
        """How many experts `rank` owns, from `rank * slots` on."""
        return min(max(0, self.n_experts - rank * self.slots), self.slots)

    def by_rank(self, loads: Tensor) -> Tensor:
        """loads (..., E) -> (..., ranks, slots), 0 in dead slots."""
        padded = F.pad(loads, (0, self.ranks * self.slots - self.n_experts))
        return padded.unflatten(-1, (self.ranks, self.slots))


class Exchange:
    """What stands in the seam `MoE.exchange` when experts live on the ranks of `mesh["expert"]`."""

    def __init__(self, owners: ExpertPlacement, mesh: DeviceMesh, overlap: bool) -> None:
        self.owners, self.mesh, self.overlap = owners, mesh, overlap
        self.group = mesh["expert"].get_group()

    def __call__(self, rows: Tensor, loads: Tensor) -> "ExpertTrip":
        return ExpertTrip(self, rows, loads)

    def sizes(self, outgoing: Tensor, incoming: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Counts (ranks, slots) -> rows to each rank, from each rank, and for each slot here.

        This is the one moment of a layer that waits for the device, so it brings all that the host needs.
        """
        counts = torch.cat([outgoing.sum(1), incoming.sum(1), incoming.sum(0)]).tolist()
        ranks = self.owners.ranks
        return counts[:ranks], counts[ranks : 2 * ranks], counts[2 * ranks :]

    def as_global_dtensor(self, tensor: Tensor) -> DTensor:
        """This rank's slots (slots, ...) of a weight, a gradient or a moment, as a part of the whole (E, ...).

        It is a view: writes reach the tensor. Dead slots have no part in it.
        """
        placed: dict[str, Placement] = {}
        part = tensor.detach()
        if isinstance(part, DTensor):
            placed.update(zip(part.device_mesh.mesh_dim_names or (), part.placements, strict=True))
            part = part.to_local()
        placed["expert"] = Shard(0)
        shape = (self.owners.n_experts, *tensor.shape[1:])
        names = self.mesh.mesh_dim_names or ()
        return DTensor.from_local(
            part[: self.owners.owned(self.mesh.get_local_rank("expert"))],
            self.mesh,
            [placed.get(name, Replicate()) for name in names],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )


def distribute(model: nn.Module, owners: ExpertPlacement, mesh: DeviceMesh, overlap: bool) -> None:
    """Leave each MoE of a model on the meta device the slots of one rank, and put an exchange into its seam."""
    for moe in model.modules():
        if isinstance(moe, MoE):
            for name, weight in list(moe.experts.named_parameters()):
                setattr(moe.experts, name, nn.Parameter(weight.new_empty(owners.slots, *weight.shape[1:])))
            moe.exchange = Exchange(owners, mesh, overlap)


def as_global_dtensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, which is parameter `name` or of its shape, as a part of the whole: see `Exchange.as_global_dtensor`."""
    path, _, leaf = name.rpartition(".experts.")
    moe = model.get_submodule(path) if leaf else None
    if isinstance(moe, MoE) and isinstance(moe.exchange, Exchange):
        return moe.exchange.as_global_dtensor(tensor)
    return tensor


class ExpertTrip:
    """The way of one layer's rows, see the top of this file."""

    def __init__(self, exchange: Exchange, rows: Tensor, loads: Tensor) -> None:
        owners = exchange.owners
        outgoing = owners.by_rank(loads)  # (ranks, slots)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=exchange.group)
        to, come, self.per_slot = exchange.sizes(outgoing, incoming)
        self.counts = incoming.sum(0)  # (slots,)
        slot = torch.arange(owners.slots, device=rows.device).repeat(owners.ranks)
        slot = slot.repeat_interleave(incoming.flatten(), output_size=sum(come))  # of each row as it comes
        self.order, self.inverse = sort_choices(slot, owners.slots)
        self.out = _Leg("out", exchange, to, come, (len(rows), sum(come)))
        self.back = _Leg("home", exchange, come, to, (sum(come), len(rows)))
        self.token = _Start.apply(rows, self.out)

    def arrive(self) -> tuple[Tensor, Tensor, list[int]]:
        """Rows (R, D) in the order of this rank's slots, counts (slots,), the same as the host knows them."""
        rows = _Permute.apply(_Finish.apply(self.token, self.out), self.order, self.inverse)
        return rows, self.counts, self.per_slot

    def send_back(self, rows: Tensor) -> None:
        """rows (R, D) in the order in which `arrive` gave them."""
        self.token = _Start.apply(_Permute.apply(rows, self.inverse, self.order), self.back)

    def home(self) -> Tensor:
        """(T K, D) in the order in which the rows were sent; what was nobody's row is undefined."""
        return _Finish.apply(self.token, self.back)


class _Leg:
    """One direction of a trip, and in the backward its reverse; between start and finish it holds what is in flight.

    lengths are those of the tensors at both ends; rows beyond the sum of the sizes stay, and nothing arrives there.
    """

    def __init__(self, name: str, exchange: Exchange, to: list[int], come: list[int], lengths: tuple[int, int]) -> None:
        self.name, self.group, self.overlap = name, exchange.group, exchange.overlap
        self.to, self.come, self.lengths = to, come, lengths
        self.flight: tuple[Any, Tensor, Tensor] | None = None  # the work, what arrives, what left

    def start(self, rows: Tensor, reverse: bool = False) -> None:
        to, come, length = (self.come, self.to, self.lengths[0]) if reverse else (self.to, self.come, self.lengths[1])
        arriving, leaving = rows.new_empty(length, rows.shape[1]), rows.contiguous()[: sum(to)]
        work = dist.all_to_all_single(arriving[: sum(come)], leaving, come, to, group=self.group, async_op=True)
        self.flight = (work, arriving, leaving)
        if not self.overlap:
            work.wait()

    def finish(self) -> Tensor:
        assert self.flight is not None
        work, arriving, _ = self.flight
        work.wait()
        self.flight = None
        return arriving

    def token(self, like: Tensor) -> Tensor:
        """Stands for the rows in flight: autograd wants the gradient of what was sent to have its shape."""
        return like.new_empty(()).expand(self.lengths[0], like.shape[1])


class _Start(torch.autograd.Function):
    """Rows set out; in the backward their gradients have arrived."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, leg: _Leg) -> Tensor:
        ctx.leg = leg
        leg.start(rows)
        return leg.token(rows)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:
        return ctx.leg.finish(), None


class _Finish(torch.autograd.Function):
    """Rows have arrived; in the backward their gradients set out."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, leg: _Leg) -> Tensor:
        ctx.leg = leg
        return leg.finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.leg.start(grad, reverse=True)
        return ctx.leg.token(grad), None


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient is a gather by the inverse one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None
