"""Expert parallelism: the placement of experts on ranks, and the all-to-all exchange of rows between them.

Each rank of the `expert` mesh holds the same number of `slots` for experts, so that tensors have the same shapes on all
ranks, for any number of experts and any number of ranks. Slots after the last expert are padding: their weights are
zero, no row is sent to them, and no checkpoint holds them.

The exchange of one MoE layer. No row is dropped, and no padding is sent:
1. One all-to-all of integers: each rank sends the loads of its tokens to the ranks that hold the experts, and so learns
   how many rows it will receive for each of its slots.
2. Dispatch, an all-to-all of rows, which are in the order of experts already. The first half of the shared expert runs
   beside it.
3. The received rows are reordered from (source rank, slot) to (slot, source rank), and the experts process them.
4. Combine, an all-to-all of the outputs in the order in which the rows were received. The second half of the shared
   expert runs beside it.
5. Each output arrives where its row was sent from.
In the backward the gradients pass from 5 to 2, because autograd runs the newest nodes first.

Letters: R rows, D dim, E experts, W ranks of the expert mesh.
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
    """Which rank holds which expert: `slots` each, in the order of torch.chunk (31 on 4 ranks: 8, 8, 8, 7)."""

    n_experts: int
    ranks: int

    @property
    def slots(self) -> int:
        """Slots for experts on each rank."""
        return -(-self.n_experts // self.ranks)

    @property
    def padding_ratio(self) -> float:
        """Slots over experts; also the busiest rank's number of experts over the mean."""
        return self.slots * self.ranks / self.n_experts

    def owned(self, rank: int) -> int:
        """The number of experts of `rank`; the first of them is expert `rank * slots`."""
        return min(max(0, self.n_experts - rank * self.slots), self.slots)

    def by_rank(self, loads: Tensor) -> Tensor:
        """loads (..., E) -> (..., W, slots), 0 in padding slots."""
        padded = F.pad(loads, (0, self.ranks * self.slots - self.n_experts))
        return padded.unflatten(-1, (self.ranks, self.slots))


class AllToAllExchange:
    """The exchange (`model.exchange.Exchange`) if experts are placed on the ranks of `mesh["expert"]`.

    Attributes:
        overlap: whether a transfer runs beside the work that follows its start; if not, its start waits for its end.
    """

    def __init__(self, placement: ExpertPlacement, mesh: DeviceMesh, overlap: bool) -> None:
        self.placement, self.mesh, self.overlap = placement, mesh, overlap
        self.group = mesh["expert"].get_group()

    def dispatch(self, rows: Tensor, loads: Tensor) -> "DispatchedRows":
        """rows (R, D) in the order of experts, with padding last; loads (E,) are the rows of each expert."""
        placement = self.placement
        sent = placement.by_rank(loads)  # (W, slots): rows for each slot of each rank
        received = torch.empty_like(sent)  # (W, slots): rows of each rank for each slot of this rank
        dist.all_to_all_single(received, sent, group=self.group)
        send_splits, recv_splits, host_counts = self.read_splits(sent, received)
        n_received = sum(recv_splits)
        slot = torch.arange(placement.slots, device=rows.device).repeat(placement.ranks)
        slot = slot.repeat_interleave(received.flatten(), output_size=n_received)  # of each row, as it arrives
        order, inverse = sort_by_expert(slot, placement.slots)
        transfer = Transfer("dispatch", self, send_splits, recv_splits, len(rows), n_received)
        return DispatchedRows(
            AllToAllHandle.start(rows, transfer), received.sum(0), host_counts, order, inverse, transfer
        )

    def combine(self, outputs: Tensor, dispatched: "DispatchedRows") -> "AllToAllHandle":
        """outputs (R, D) of the experts for the rows that `dispatched` received, in the same order."""
        there = dispatched.transfer
        transfer = Transfer("combine", self, there.recv_splits, there.send_splits, there.n_received, there.n_sent)
        return AllToAllHandle.start(reorder(outputs, dispatched.inverse, dispatched.order), transfer)

    def read_splits(self, sent: Tensor, received: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Counts (W, slots) -> rows to each rank, rows from each rank, and rows for each slot of this rank.

        In a layer this is the only time that the host waits for the device, so it reads all that the host needs.
        """
        counts = torch.cat([sent.sum(1), received.sum(1), received.sum(0)]).tolist()
        ranks = self.placement.ranks
        return counts[:ranks], counts[ranks : 2 * ranks], counts[2 * ranks :]

    def as_global_dtensor(self, tensor: Tensor) -> DTensor:
        """This rank's slots (slots, ...) of a weight, a gradient or a moment, as a part of the whole (E, ...).

        It is a view: writing to it writes to the tensor. Padding slots are no part of it.
        """
        placements: dict[str, Placement] = {}
        part = tensor.detach()
        if isinstance(part, DTensor):
            placements.update(zip(part.device_mesh.mesh_dim_names or (), part.placements, strict=True))
            part = part.to_local()
        placements["expert"] = Shard(0)
        shape = (self.placement.n_experts, *tensor.shape[1:])
        names = self.mesh.mesh_dim_names or ()
        return DTensor.from_local(
            part[: self.placement.owned(self.mesh.get_local_rank("expert"))],
            self.mesh,
            [placements.get(name, Replicate()) for name in names],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )


def distribute(model: nn.Module, placement: ExpertPlacement, mesh: DeviceMesh, overlap: bool) -> None:
    """Reduce each MoE of a model on the meta device to the slots of one rank, and give it an `AllToAllExchange`."""
    for moe in model.modules():
        if isinstance(moe, MoE):
            moe.experts.resize(placement.slots)
            moe.exchange = AllToAllExchange(placement, mesh, overlap)


def as_global_dtensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, which is parameter `name` or has its shape, as a part of the whole.

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
        send_splits, recv_splits: (W,) the rows to each rank and from each rank, in the forward.
        n_sent, n_received: the rows of the tensors at both ends. Those beyond the sum of the splits are padding: they
            are not sent, and the values received for them are undefined.
        in_flight: between `start` and `finish` the work, the tensor that it fills, and the one that it sends.
    """

    def __init__(
        self,
        name: str,
        exchange: AllToAllExchange,
        send_splits: list[int],
        recv_splits: list[int],
        n_sent: int,
        n_received: int,
    ) -> None:
        self.name, self.group, self.overlap = name, exchange.group, exchange.overlap
        self.send_splits, self.recv_splits = send_splits, recv_splits
        self.n_sent, self.n_received = n_sent, n_received
        self.in_flight: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, backward: bool = False) -> None:
        """Start to send rows: in the forward (n_sent, D), in the backward gradients (n_received, D)."""
        if backward:
            send_splits, recv_splits, length = self.recv_splits, self.send_splits, self.n_sent
        else:
            send_splits, recv_splits, length = self.send_splits, self.recv_splits, self.n_received
        received = rows.new_empty(length, rows.shape[1])
        sent = rows.contiguous()[: sum(send_splits)]
        work = dist.all_to_all_single(
            received[: sum(recv_splits)], sent, recv_splits, send_splits, group=self.group, async_op=True
        )
        self.in_flight = (work, received, sent)
        if not self.overlap:
            work.wait()

    def finish(self) -> Tensor:
        """Wait for the rows that were started last, and return those received."""
        assert self.in_flight is not None
        work, received, _ = self.in_flight
        work.wait()
        self.in_flight = None
        return received

    def placeholder(self, like: Tensor) -> Tensor:
        """A tensor without memory that represents the rows in flight in the graph.

        It has the shape (n_sent, D), because autograd requires that a gradient has the shape of its tensor.
        """
        return like.new_empty(()).expand(self.n_sent, like.shape[1])


@dataclass(frozen=True)
class AllToAllHandle:
    """Rows in flight: two nodes of the graph, `_Start` and `_Finish`, with the work that is placed between them."""

    in_flight: Tensor  # the placeholder of `_Start`
    transfer: Transfer

    @classmethod
    def start(cls, rows: Tensor, transfer: Transfer) -> "AllToAllHandle":
        return cls(_Start.apply(rows, transfer), transfer)

    def wait(self) -> Tensor:
        """Returns the received rows (R, D), in the order (source rank, order of its rows)."""
        return _Finish.apply(self.in_flight, self.transfer)


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
