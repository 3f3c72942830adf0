"""Expert parallelism: the placement of experts on ranks, and the all-to-all exchange of rows between them.

Each rank of the `expert` mesh holds the same number of `slots` for experts, so that tensors have the same shapes on all
ranks, for any number of experts and any number of ranks. Slots after the last expert are padding: their weights are
zero, no row is sent to them, and no checkpoint holds them.

The exchange of one MoE layer. No row is dropped, and no padding is sent:
1. One all-to-all of integers: each rank sends the loads of its tokens to the ranks that hold the experts, and learns
   how many rows it will receive for each of its slots.
2. Dispatch, an all-to-all of rows, which are already in the order of experts. It overlaps with the first half of the
   shared expert.
3. The received rows are reordered from (source rank, slot) to (slot, source rank), and the experts process them.
4. Combine, an all-to-all of the outputs in the order in which the rows were received. It overlaps with the second half
   of the shared expert.
5. Each output arrives where its row was sent from.
In the backward the gradients pass from 5 to 2. The transfers again overlap with the shared expert, because autograd
runs the newest nodes first.

Letters: R rows of this process's tokens, R_recv rows that it receives, D dim, E experts, EP ranks of the expert mesh.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from model.exchange import ReceivedRows
from model.moe import Experts, MoE
from model.permute import reorder, sort_by_expert


@dataclass(frozen=True)
class ExpertPlacement:
    """Which rank holds which expert.

    Each rank has `slots` slots, assigned as by torch.chunk (31 experts on 4 ranks: 8, 8, 8, 7).
    """

    n_experts: int
    ranks: int

    @property
    def slots(self) -> int:
        """Slots for experts on each rank."""
        return -(-self.n_experts // self.ranks)

    @property
    def padding_ratio(self) -> float:
        """Slots over experts; also the largest number of experts on a rank, over the mean."""
        return self.slots * self.ranks / self.n_experts

    def owned(self, rank: int) -> int:
        """The number of experts of `rank`; the first of them is expert `rank * slots`."""
        return min(max(0, self.n_experts - rank * self.slots), self.slots)

    def by_rank(self, loads: Tensor) -> Tensor:
        """loads (..., E) -> (..., EP, slots), 0 in padding slots."""
        padded = F.pad(loads, (0, self.ranks * self.slots - self.n_experts))
        return padded.unflatten(-1, (self.ranks, self.slots))


class AllToAllExchange:
    """The exchange (`model.exchange.Exchange`) if experts are placed on the ranks of `mesh["expert"]`.

    Attributes:
        overlap: whether a transfer overlaps with the work that follows its start; if not, starting blocks until it is
            done.
    """

    def __init__(self, placement: ExpertPlacement, mesh: DeviceMesh, overlap: bool) -> None:
        self.placement, self.mesh, self.overlap = placement, mesh, overlap
        self.group = mesh["expert"].get_group()

    def dispatch(self, rows: Tensor, loads: Tensor) -> "DispatchedRows":
        """rows (R, D) in the order of experts, with padding last; loads (E,) are the rows per expert."""
        placement = self.placement
        send_counts = placement.by_rank(loads)  # (EP, slots): rows for each slot of each rank
        recv_counts = torch.empty_like(send_counts)  # (EP, slots): rows of each rank for each slot of this rank
        dist.all_to_all_single(recv_counts, send_counts, group=self.group)
        send_splits, recv_splits, host_counts = self.read_splits(send_counts, recv_counts)
        n_destination = sum(recv_splits)
        slot = torch.arange(placement.slots, device=rows.device).repeat(placement.ranks)
        # slot of each row, in order of arrival
        slot = slot.repeat_interleave(recv_counts.flatten(), output_size=n_destination)
        order, inverse = sort_by_expert(slot, placement.slots)
        transfer = Transfer("dispatch", self, send_splits, recv_splits, len(rows), n_destination)
        return DispatchedRows(
            AllToAllHandle.start(rows, transfer), recv_counts.sum(0), host_counts, order, inverse, transfer
        )

    def combine(self, outputs: Tensor, dispatched: "DispatchedRows") -> "AllToAllHandle":
        """outputs (R_recv, D) of the experts for the rows that `dispatched` received, in the same order."""
        dispatch_transfer = dispatched.transfer
        transfer = Transfer(
            "combine",
            self,
            send_splits=dispatch_transfer.recv_splits,
            recv_splits=dispatch_transfer.send_splits,
            n_source=dispatch_transfer.n_destination,
            n_destination=dispatch_transfer.n_source,
        )
        return AllToAllHandle.start(reorder(outputs, dispatched.inverse, dispatched.order), transfer)

    def read_splits(self, send_counts: Tensor, recv_counts: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Counts (EP, slots) -> rows to each rank, rows from each rank, and rows for each slot of this rank.

        In a layer this is the only time that the host waits for the device, so it reads all that the host needs.
        """
        counts = torch.cat([send_counts.sum(1), recv_counts.sum(1), recv_counts.sum(0)]).tolist()
        ranks = self.placement.ranks
        return counts[:ranks], counts[ranks : 2 * ranks], counts[2 * ranks :]

    def as_global_dtensor(self, tensor: Tensor) -> DTensor:
        """This rank's slots (slots, ...) of a weight, a gradient or a moment, as a shard of the whole (E, ...).

        It is a view: writing to it writes to the tensor. Padding slots are not in it.
        """
        placements: dict[str, Placement] = {}
        shard = tensor.detach()
        if isinstance(shard, DTensor):
            placements.update(zip(shard.device_mesh.mesh_dim_names or (), shard.placements, strict=True))
            shard = shard.to_local()
        placements["expert"] = Shard(0)
        shape = (self.placement.n_experts, *tensor.shape[1:])
        names = self.mesh.mesh_dim_names or ()
        return DTensor.from_local(
            shard[: self.placement.owned(self.mesh.get_local_rank("expert"))],
            self.mesh,
            [placements.get(name, Replicate()) for name in names],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )


def distribute(model: nn.Module, placement: ExpertPlacement, mesh: DeviceMesh, overlap: bool) -> None:
    """Shrink each MoE of a model on the meta device to the slots of one rank, and give it an `AllToAllExchange`."""
    for moe in model.modules():
        if isinstance(moe, MoE):
            moe.experts.resize(placement.slots)
            moe.exchange = AllToAllExchange(placement, mesh, overlap)


def parameter_as_global_dtensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, which is parameter `name`, its gradient or a moment, as a shard of the whole (E, ...).

    See `AllToAllExchange.as_global_dtensor`. Tensors that do not belong to distributed experts are returned unchanged.
    """
    owner, _, _ = name.rpartition(".")
    if not isinstance(model.get_submodule(owner), Experts):
        return tensor
    owner_of_experts, _, _ = owner.rpartition(".")
    moe = model.get_submodule(owner_of_experts)
    if isinstance(moe, MoE) and isinstance(moe.exchange, AllToAllExchange):
        return moe.exchange.as_global_dtensor(tensor)
    return tensor


class Transfer:
    """One all-to-all of rows in the forward, and the opposite one of their gradients in the backward.

    Attributes:
        send_splits, recv_splits: (EP,) the rows to each rank and from each rank, in the forward.
        n_source, n_destination: the rows of the tensors at both ends, in the forward. Those beyond the sum of the
            splits are padding: they are not sent, and the values received for them are undefined.
        in_flight: between `start` and `finish`, the work, the tensor that it fills, and the one that it sends.
    """

    def __init__(
        self,
        name: str,
        exchange: AllToAllExchange,
        send_splits: list[int],
        recv_splits: list[int],
        n_source: int,
        n_destination: int,
    ) -> None:
        self.name, self.group, self.overlap = name, exchange.group, exchange.overlap
        self.send_splits, self.recv_splits = send_splits, recv_splits
        self.n_source, self.n_destination = n_source, n_destination
        self.in_flight: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, backward: bool = False) -> None:
        """Start sending rows: in the forward (n_source, D), in the backward gradients (n_destination, D)."""
        if backward:
            send_splits, recv_splits, length = self.recv_splits, self.send_splits, self.n_source
        else:
            send_splits, recv_splits, length = self.send_splits, self.recv_splits, self.n_destination
        received = rows.new_empty(length, rows.shape[1])
        sent = rows.contiguous()[: sum(send_splits)]
        work = dist.all_to_all_single(
            received[: sum(recv_splits)], sent, recv_splits, send_splits, group=self.group, async_op=True
        )
        self.in_flight = (work, received, sent)
        if not self.overlap:
            work.wait()

    def finish(self) -> Tensor:
        """Wait for the transfer started last, and return the rows that it received."""
        assert self.in_flight is not None
        work, received, _ = self.in_flight
        work.wait()
        self.in_flight = None
        return received

    def placeholder(self, like: Tensor) -> Tensor:
        """A tensor of one element, expanded, that represents the rows in flight in the graph.

        Autograd requires that a gradient has the shape of its tensor. Any fixed shape works; that of the rows is used:
        (n_source, D).
        """
        return like.new_empty(()).expand(self.n_source, like.shape[1])


@dataclass(frozen=True)
class AllToAllHandle:
    """Rows in flight: two nodes of the graph, `_Start` and `_Finish`, and what is called between them overlaps."""

    placeholder: Tensor  # the output of `_Start`
    transfer: Transfer

    @classmethod
    def start(cls, rows: Tensor, transfer: Transfer) -> "AllToAllHandle":
        return cls(_Start.apply(rows, transfer), transfer)

    def wait(self) -> Tensor:
        """Returns the received rows (n_destination, D), in the order (source rank, order of its rows)."""
        return _Finish.apply(self.placeholder, self.transfer)


@dataclass(frozen=True)
class DispatchedRows:
    """Rows in flight to their experts, and the data with which `AllToAllExchange.combine` sends the outputs back."""

    handle: AllToAllHandle
    counts: Tensor  # (slots,): rows for each slot of this rank
    host_counts: list[int]  # the same
    order: Tensor  # from the order of arrival to that of slots, see `permute.py`
    inverse: Tensor
    transfer: Transfer

    def wait(self) -> ReceivedRows:
        """Returns the rows in the order of this rank's slots."""
        return ReceivedRows(reorder(self.handle.wait(), self.order, self.inverse), self.counts, self.host_counts)


class _Start(torch.autograd.Function):
    """The forward starts to send rows; the backward receives their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.start(rows)
        return transfer.placeholder(rows)

    @staticmethod
    def backward(ctx: Any, placeholder: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _Finish(torch.autograd.Function):
    """The forward receives rows; the backward starts to send their gradients."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.start(grad, backward=True)
        return ctx.transfer.placeholder(grad), None
