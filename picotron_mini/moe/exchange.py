"""An all_to_all with uneven parts that has a gradient, and that may travel while something else is computed.

Rank i sends `sends[j]` of its rows to rank j, and nobody knows the numbers but the router. The gradient of a row goes
back where the row came from: the same exchange with the two lists of numbers swapped.

    forward     rank 0: [a a b] --sends 2, 1-->      rank 0: [a a c]   rank 1: [b]     (rank 1 had [c], sends 1, 0)
    backward    rank 0: [a' a' b'] <--receives 2, 1-- rank 0: [a' a' c']  rank 1: [b']

Keep the lists as they were and, where every rank sends every other equally much, nothing is noticed.

To hide the journey the exchange is two nodes of the graph, with a gap between them for other work:

    forward     start ------> other work ------> wait          what `start` returns is a ticket for the rows, not rows
    backward    wait's: starts the way back      start's: waits for it

Autograd runs, of the nodes whose gradients are known, the one that was made last. The other work was made between the
two, so its backward runs between theirs: the way back is hidden as well, without a line of code for it.

Rows may travel in a narrower form than they have (`payload.py`), one form each way: packed before they set out,
unpacked when they are there.

Cost in payload: the bytes of the packed x forward; backward those of the packed gradients of what arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd import Function

from ..collectives import Work, all_to_all_async
from ..mesh import Axis
from .payload import Form, pack, unpack


class UnevenExchange:
    """One such exchange, for one tensor.

        trip = UnevenExchange(axis, sends=[2, 1], receives=[2, 0])
        ticket = trip.start(x)         # of x [3, ...]
        something_else()
        rows = trip.wait(ticket)       # [2, ...]

    Args:
        axis: the ranks that trade rows.
        sends: how many rows of x go to each rank of the axis, in rank order.
        receives: how many come from each.
        out, back: the form in which rows go out, and in which their gradients come back.
    """

    def __init__(
        self, axis: Axis, sends: Sequence[int], receives: Sequence[int], out: Form = "same", back: Form = "same"
    ) -> None:
        self.axis, self.sends, self.receives, self.out, self.back = axis, list(sends), list(receives), out, back
        self.work: Work | None = None
        self.messages: tuple[Tensor, Tensor] | None = None  # what the work fills and reads: alive until it is done

    def start(self, x: Tensor) -> Tensor:
        """Let the rows of x [sum(sends), ...] set out; the result is for `wait`, and has no numbers in it."""
        ticket: Tensor = _Start.apply(x, self)
        return ticket

    def wait(self, ticket: Tensor) -> Tensor:
        """The rows [sum(receives), ...], once they are here."""
        rows: Tensor = _Wait.apply(ticket, self)
        return rows

    def depart(self, x: Tensor, form: Form, sends: Sequence[int], receives: Sequence[int]) -> None:
        """Start sending x in this form."""
        going = pack(x, form)
        coming = going.new_empty(sum(receives), *going.shape[1:])
        self.messages = coming, going
        self.work = all_to_all_async(coming, going, self.axis, receives, sends)

    def arrive(self, form: Form, like: Tensor) -> Tensor:
        """Wait for what is under way in this form, and let go of what was kept alive for it."""
        assert self.work is not None and self.messages is not None, "nothing is under way"
        self.work.wait()
        rows = unpack(self.messages[0], form, like.dtype)
        self.work = self.messages = None
        return rows

    def __call__(self, x: Tensor) -> Tensor:
        """`start` and `wait` with nothing between."""
        return self.wait(self.start(x))


# What stands in the graph for rows under way is a ticket: it has their shape, one number of memory, and no values.
class _Start(Function):
    @staticmethod
    def forward(ctx, x, trip):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        trip.depart(x, trip.out, trip.sends, trip.receives)
        return x.new_empty(()).expand(sum(trip.receives), *x.shape[1:])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ctx.trip.arrive(ctx.trip.back, grad), None


class _Wait(Function):
    @staticmethod
    def forward(ctx, ticket, trip):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        return trip.arrive(trip.out, ticket)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.trip.depart(grad, ctx.trip.back, ctx.trip.receives, ctx.trip.sends)
        return grad, None  # autograd wants a gradient of the ticket; `_Start.backward` has a better one
