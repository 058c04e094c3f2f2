"""Collectives that are started now and waited for later, so that a rank computes while they travel.

    work = all_reduce_async(gradients, axis)     the call returns at once
    ...                                          other work; `gradients` is left alone
    work.wait()                                  now it is the sum

Bytes count when the work is started. Sends and receives between two ranks, and `rotate` along a ring, are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, ReduceScatterOptions  # type: ignore[attr-defined]

from ..mesh import Axis
from . import operators
from .counting import ledger


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


class Done:
    """The work of an axis of one rank: nothing to wait for."""

    def wait(self) -> None:
        return None


def all_reduce_async(x: Tensor, axis: Axis) -> Work:
    """Start summing x over the axis, in place; x holds the sum after `wait()`."""
    if axis.size == 1:
        return Done()
    ledger.record(axis.key, "all_reduce", x)
    return _started(dist.all_reduce(x, group=axis.group, async_op=True))


def all_gather_async(out: Tensor, x: Tensor, axis: Axis) -> Work:
    """Start putting the ranks' x, in rank order, into `out`; both must be kept and left alone until `wait()`.

    Args:
        out: contiguous, as many elements as all the x together.
        x: contiguous, of one size on every rank.
    """
    if axis.size == 1:
        out.copy_(x.view_as(out))
        return Done()
    ledger.record(axis.key, "all_gather", x)
    return _started(
        operators.torch_all_gather(out.detach().view(-1), x.detach().view(-1), group=axis.group, async_op=True)
    )


def reduce_scatter_async(out: Tensor, x: Tensor, axis: Axis) -> Work:
    """Start summing x over the axis; `out` gets this rank's part of the sum. Both must be kept until `wait()`.

    Args:
        out: contiguous, 1 / axis.size of the elements of x.
        x: contiguous, the ranks' parts one behind the other.
    """
    if axis.size == 1:
        out.copy_(x.view_as(out))
        return Done()
    ledger.record(axis.key, "reduce_scatter", x)
    return _started(
        operators.torch_reduce_scatter(out.detach().view(-1), x.detach().view(-1), group=axis.group, async_op=True)
    )


def all_gather_several(outs: Sequence[Tensor], xs: Sequence[Tensor], axis: Axis) -> Work:
    """Start `all_gather_async` of several pairs of tensors as one, which pays the latency of one.

    NCCL has this built in. Gloo gets one tensor that holds them all: its own coalesced all_gather corrupts the heap,
    once in some thousand calls (seen with torch 2.13).

    Args:
        outs, xs: each pair as there; of one dtype, and not none.
    """
    if axis.size > 1 and xs[0].is_cuda:
        start = axis.group.allgather_into_tensor_coalesced
        return _coalesced(axis, "all_gather", start, AllgatherOptions(), outs, xs)
    x = torch.cat([x.detach().view(-1) for x in xs])
    whole = x.new_empty(axis.size, len(x))
    return _Spread(all_gather_async(whole, x, axis), whole, [out.detach().view(axis.size, -1) for out in outs])


def reduce_scatter_several(outs: Sequence[Tensor], xs: Sequence[Tensor], axis: Axis) -> Work:
    """Start `reduce_scatter_async` of several pairs of tensors as one, as `all_gather_several` does."""
    if axis.size > 1 and xs[0].is_cuda:
        start = axis.group.reduce_scatter_tensor_coalesced
        return _coalesced(axis, "reduce_scatter", start, ReduceScatterOptions(), outs, xs)
    x = torch.cat([x.detach().view(axis.size, -1) for x in xs], dim=1)
    part = x.new_empty(1, x.shape[1])
    return _Spread(reduce_scatter_async(part, x, axis), part, [out.detach().view(1, -1) for out in outs])


def _coalesced(
    axis: Axis, operation: str, start: Callable[..., Any], options: Any, outs: Sequence[Tensor], xs: Sequence[Tensor]
) -> Work:
    for x in xs:
        ledger.record(axis.key, operation, x)
    options.asyncOp = True  # the sum is what its options ask for, unless they say otherwise
    return _started(start([out.detach().view(-1) for out in outs], [x.detach().view(-1) for x in xs], options))


class _Spread:
    """A collective into one tensor, whose columns belong into several."""

    def __init__(self, work: Work, whole: Tensor, outs: Sequence[Tensor]) -> None:
        self.work, self.whole, self.outs = work, whole, outs

    def wait(self) -> None:
        self.work.wait()
        for out, columns in zip(self.outs, self.whole.split([out.shape[1] for out in self.outs], dim=1), strict=True):
            out.copy_(columns)


def all_to_all_async(
    out: Tensor, x: Tensor, axis: Axis, receives: Sequence[int], sends: Sequence[int], operation: str = "all_to_all"
) -> Work:
    """Start sending the first `sends[0]` rows of x to rank 0, the next `sends[1]` to rank 1, and so on.

    Args:
        out: contiguous, gets the `receives[j]` rows that each rank j sends, in rank order; filled after `wait()`.
        x: contiguous; must be kept and left alone until `wait()`.
        receives, sends: one number for each rank of the axis, zero included; what j sends to i, i receives from j.
        operation: under which name the ledger counts it: control traffic is kept apart from what it controls.
    """
    if axis.size == 1:
        out.copy_(x)
        return Done()
    ledger.record(axis.key, operation, x)
    return _started(dist.all_to_all_single(out, x, list(receives), list(sends), group=axis.group, async_op=True))


def send(x: Tensor, axis: Axis, to: int) -> Work:
    """Start sending x to coordinate `to`; x must be kept alive and unchanged until `wait()`."""
    ledger.record(axis.key, "send", x)
    return _started(dist.isend(x, axis.ranks[to], group=axis.group))


def receive(buffer: Tensor, axis: Axis, source: int) -> Work:
    """Start receiving into `buffer` from coordinate `source`; it is filled after `wait()`."""
    return _started(dist.irecv(buffer, axis.ranks[source], group=axis.group))


def rotate(x: Tensor, axis: Axis) -> tuple[Tensor, Work]:
    """Start passing x to the next rank of the ring, and receiving the previous rank's, of the same shape.

    The two are started as one: on NCCL two ranks that each sent first would wait for each other for ever.

    Returns:
        The buffer, filled after `wait()`, and the work. Until then x must stay unchanged; the work keeps it alive.
    """
    buffer = torch.empty_like(x, memory_format=torch.contiguous_format)
    after, before = (axis.ranks[(axis.index + step) % axis.size] for step in (1, -1))
    ledger.record(axis.key, "send", x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, after, group=axis.group),
            dist.P2POp(dist.irecv, buffer, before, group=axis.group),
        ]
    )
    return buffer, _Rotation(works, x)


class _Rotation:
    """A send and a receive as one work."""

    def __init__(self, works: list[Any], sent: Tensor) -> None:
        self.works, self.sent = works, sent

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _started(work: Work | None) -> Work:
    assert work is not None, "this rank is not in the group"
    return work
