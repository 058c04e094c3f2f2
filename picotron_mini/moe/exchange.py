"""An all_to_all with uneven parts that has a gradient, and that may travel while something else is computed.

Rank i sends `sends[j]` of its rows to rank j, and nobody knows the numbers but the router. The gradient of a row goes
back where the row came from: the same exchange with the two lists of numbers swapped.

    forward     rank 0: [a a b] --sends 2, 1-->      rank 0: [a a c]   rank 1: [b]     (rank 1 had [c], sends 1, 0)
    backward    rank 0: [a' a' b'] <--receives 2, 1-- rank 0: [a' a' c']  rank 1: [b']

Keep the lists as they were and, where every rank sends every other equally much, nothing is noticed.

To hide the journey the exchange is two nodes of the graph, with a gap between them for other work:

    forward     start ------> other work ------> wait          what `start` returns must not be read before `wait`
    backward    wait's: starts the way back      start's: waits for it

Autograd runs, of the nodes whose gradients are known, the one that was made last. The other work was made between the
two, so its backward runs between theirs: the way back is hidden as well, without a line of code for it.

Cost in payload: the bytes of x forward; backward those of what arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd import Function

from ..collectives import Work, all_to_all_async
from ..mesh import Axis


class UnevenExchange:
    """One such exchange, for one tensor.

        trip = UnevenExchange(axis, sends=[2, 1], receives=[2, 0])
        arriving = trip.start(x)       # [3, ...]
        something_else()
        rows = trip.wait(arriving)     # [2, ...]

    Args:
        axis: the ranks that trade rows.
        sends: how many rows of x go to each rank of the axis, in rank order.
        receives: how many come from each.
    """

    def __init__(self, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> None:
        self.axis, self.sends, self.receives = axis, list(sends), list(receives)
        self.work: Work | None = None
        self.sent: Tensor | None = None  # what the work reads must stay alive until it is done
        self.gradient: Tensor | None = None  # of x, on its way back

    def start(self, x: Tensor) -> Tensor:
        """Let the rows of x [sum(sends), ...] set out; the result [sum(receives), ...] is there after `wait`."""
        out: Tensor = _Start.apply(x, self)
        return out

    def wait(self, arriving: Tensor) -> Tensor:
        """The rows, once they are here."""
        out: Tensor = _Wait.apply(arriving, self)
        return out

    def arrived(self) -> None:
        """Wait for what is under way, and let go of what was kept alive for it."""
        assert self.work is not None, "nothing is under way"
        self.work.wait()
        self.work = self.sent = None

    def __call__(self, x: Tensor) -> Tensor:
        """`start` and `wait` with nothing between."""
        return self.wait(self.start(x))


class _Start(Function):
    @staticmethod
    def forward(ctx, x, trip):  # type: ignore[no-untyped-def]
        ctx.trip, trip.sent = trip, x.contiguous()
        out = x.new_empty(sum(trip.receives), *x.shape[1:])
        trip.work = all_to_all_async(out, trip.sent, trip.axis, trip.receives, trip.sends)
        return out

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        ctx.trip.arrived()
        gradient, ctx.trip.gradient = ctx.trip.gradient, None
        return gradient, None


class _Wait(Function):
    @staticmethod
    def forward(ctx, arriving, trip):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        trip.arrived()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        trip = ctx.trip
        trip.sent = grad.contiguous()
        trip.gradient = grad.new_empty(sum(trip.sends), *grad.shape[1:])
        trip.work = all_to_all_async(trip.gradient, trip.sent, trip.axis, trip.sends, trip.receives)
        return grad, None  # autograd wants a gradient of what arrived; `_Start.backward` has a better one
