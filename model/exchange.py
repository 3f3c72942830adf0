"""The interface between an MoE and the processes that hold its experts: dispatching of rows, and
combining of outputs.

`LocalExchange` is for experts on one process, `parallel.experts.AllToAllExchange` for experts on many.

Letters: R rows of this process's tokens, R_recv rows that it receives for its experts, D dim, E experts.
"""

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

Result = TypeVar("Result")


class ReceivedRows(NamedTuple):
    """The rows for the experts of this process: the arguments of `Experts.forward`."""

    rows: Tensor  # (R_recv, D), sorted by expert
    counts: Tensor  # (experts of this process,): rows per expert
    host_counts: list[int] | None  # the same numbers, if the host knows them


class DispatchHandle(Protocol):
    """Rows in flight to their experts."""

    def wait(self) -> ReceivedRows:
        """Returns the rows that the experts of this process received."""


class CombineHandle(Protocol):
    """Outputs of experts in flight to the processes that sent the rows."""

    def wait(self) -> Tensor:
        """Returns the outputs (R, D) in the order in which the rows were dispatched."""


class Exchange(Protocol):
    """Sends rows to the processes that hold their experts, and the experts' outputs back.

    `dispatch` and `combine` only start a transfer, and return a handle; its `wait` finishes the transfer. Work between
    the two calls overlaps with the transfer.
    """

    def dispatch(self, rows: Tensor, loads: Tensor) -> DispatchHandle:
        """Start sending rows (R, D), sorted by expert; loads (E,) are the rows per expert.

        Rows beyond the sum of the loads are padding, and are not sent.
        """

    def combine(self, outputs: Tensor, dispatched: Any) -> CombineHandle:
        """Start sending back the outputs (R_recv, D) for the rows that the handle `dispatched` received."""


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """The handle of a transfer that needs no time."""

    result: Result

    def wait(self) -> Result:
        return self.result


class LocalExchange:
    """The exchange if all experts are on this process: rows stay where they are."""

    def dispatch(self, rows: Tensor, loads: Tensor) -> Finished[ReceivedRows]:
        return Finished(ReceivedRows(rows, loads, None))

    def combine(self, outputs: Tensor, dispatched: Finished[ReceivedRows]) -> Finished[Tensor]:
        return Finished(outputs)
