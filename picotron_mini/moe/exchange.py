"""Exchanges of rows that have a gradient, and that may travel while something else is computed.

**Uneven.** Rank i sends `sends[j]` of its rows to rank j, and nobody knows the numbers but the router. The gradient of
a row goes back where the row came from: the same exchange with the two lists of numbers swapped.

    forward     rank 0: [a a b] --sends 2, 1-->      rank 0: [a a c]   rank 1: [b]     (rank 1 had [c], sends 1, 0)
    backward    rank 0: [a' a' b'] <--receives 2, 1-- rank 0: [a' a' c']  rank 1: [b']

Keep the lists as they were and, where every rank sends every other equally much, nothing is noticed.

**To all, and summed.** An all_gather brings all ranks' rows to each, and its gradient is the sum of what each made of
them, a reduce_scatter. The other way round the two change places.

To hide the journey a trip is two nodes of the graph, with a gap between them for other work:

    forward     start ------> other work ------> wait          what `start` returns is a ticket for the rows, not rows
    backward    wait's: starts the way back      start's: waits for it

Autograd runs, of the nodes whose gradients are known, the one that was made last. The other work was made between the
two, so its backward runs between theirs: the way back is hidden as well, without a line of code for it.

Rows of an uneven exchange may travel in a narrower form than they have (`payload.py`), one form each way: packed before
they set out, unpacked when they are there.

Cost in payload: of an uneven exchange the bytes of the packed x forward, backward those of the packed gradients of what
arrived; of the others what an all_gather or a reduce_scatter of x costs, and backward of its gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.autograd import Function

from ..collectives import Work, all_gather_async, all_to_all_async, reduce_scatter_async
from ..mesh import Axis
from .payload import Form, pack, unpack


class Trip(ABC):
    """One journey of rows, and of their gradients back, for one tensor.

    trip = UnevenExchange(axis, sends=[2, 1], receives=[2, 0])
    ticket = trip.start(x)         # of x [3, ...]
    something_else()
    rows = trip.wait(ticket)       # [2, ...]
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.work: Work | None = None
        self.messages: tuple[Tensor, Tensor] | None = None  # what the work fills and reads: alive until it is done

    def start(self, x: Tensor) -> Tensor:
        """Let the rows of x set out; the result is for `wait`, and has no numbers in it."""
        ticket: Tensor = _Start.apply(x, self)
        return ticket

    def wait(self, ticket: Tensor) -> Tensor:
        """The rows, once they are here."""
        rows: Tensor = _Wait.apply(ticket, self)
        return rows

    def __call__(self, x: Tensor) -> Tensor:
        """`start` and `wait` with nothing between."""
        return self.wait(self.start(x))

    @abstractmethod
    def depart(self, x: Tensor, back: bool) -> None:
        """Start sending x, rows or gradients on their way back: sets `work`, and `messages` (coming, going)."""

    def arrive(self, like: Tensor, back: bool) -> Tensor:
        """Wait for what is under way, and let go of what was kept alive for it."""
        assert self.work is not None and self.messages is not None, "nothing is under way"
        self.work.wait()
        coming = self.messages[0]
        self.work = self.messages = None
        return coming


class UnevenExchange(Trip):
    """All_to_all of rows [sum(sends), ...] -> [sum(receives), ...].

    Args:
        axis: the ranks that trade rows.
        sends: how many rows of x go to each rank of the axis, in rank order.
        receives: how many come from each.
        out, home: the form in which rows go out, and in which their gradients come back.
    """

    def __init__(
        self, axis: Axis, sends: Sequence[int], receives: Sequence[int], out: Form = "same", home: Form = "same"
    ) -> None:
        super().__init__(axis)
        self.sends, self.receives, self.out, self.home = list(sends), list(receives), out, home

    def depart(self, x: Tensor, back: bool) -> None:
        receives, sends = (self.sends, self.receives) if back else (self.receives, self.sends)
        going = pack(x, self.home if back else self.out)
        coming = going.new_empty(sum(receives), *going.shape[1:])
        self.messages = coming, going
        self.work = all_to_all_async(coming, going, self.axis, receives, sends)

    def arrive(self, like: Tensor, back: bool) -> Tensor:
        return unpack(super().arrive(like, back), self.home if back else self.out, like.dtype)


class GatherTrip(Trip):
    """All_gather of rows [n, ...] -> [ranks n, ...], as many from each rank; of its gradients the sum."""

    def depart(self, x: Tensor, back: bool) -> None:
        _all_or_sum(self, x, gather=not back)


class ScatterTrip(Trip):
    """Sum of the ranks' rows [ranks n, ...], of which each keeps its part [n, ...]; its gradients are gathered."""

    def depart(self, x: Tensor, back: bool) -> None:
        _all_or_sum(self, x, gather=back)


def _all_or_sum(trip: Trip, x: Tensor, gather: bool) -> None:
    going, ranks = x.contiguous(), trip.axis.size
    coming = going.new_empty(len(x) * ranks if gather else len(x) // ranks, *x.shape[1:])
    trip.messages = coming, going
    trip.work = (all_gather_async if gather else reduce_scatter_async)(coming, going, trip.axis)


# What stands in the graph for rows under way is a ticket: it has their shape, one number of memory, and no values.
class _Start(Function):
    @staticmethod
    def forward(ctx, x, trip):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        trip.depart(x, False)
        return x.new_empty(()).expand(len(trip.messages[0]), *x.shape[1:])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ctx.trip.arrive(grad, True), None


class _Wait(Function):
    @staticmethod
    def forward(ctx, ticket, trip):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        return trip.arrive(ticket, False)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.trip.depart(grad, True)
        return grad, None  # autograd wants a gradient of the ticket; `_Start.backward` has a better one
