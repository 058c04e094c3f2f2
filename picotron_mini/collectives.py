"""Every byte between ranks passes through here, and is counted.

Plain collectives take a tensor and an axis. The *conjugate pairs* are what tensor parallelism is made of:
each is a function whose gradient is another collective.

    forward                                   backward
    copy_to      x on every rank              all_reduce the gradients (each rank used its own copy of x)
    reduce_from  all_reduce the partial sums  copy: the derivative of a sum hands each term the gradient
    gather_from  all_gather the shards        reduce_scatter the gradients: each rank used all of x
    scatter_to   reduce_scatter partial sums  all_gather the gradients
    exchange     all_to_all                   all_to_all: each part's gradient goes back where the part came from

Swap two and the model still runs, still learns a little, and is wrong (Megatron-LM, arXiv 1909.08053).

The ledger's unit is the *payload a rank hands to torch.distributed*, padding included: N for an all_reduce of
N bytes, the own shard for an all_gather, the whole input for a reduce_scatter, nothing for a receive. A ring
moves 2(n-1)/n of an all_reduce's payload over each rank's wire; a tree moves other amounts; the payload is the same.

The collectives are custom operators, so that they and the ledger inside them behave the same eagerly and in
`torch.compile(fullgraph=True)`. An axis of size 1 costs nothing and counts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.distributed_c10d import AllgatherOptions, ReduceScatterOptions  # type: ignore[attr-defined]

from .mesh import GROUPS, Axis


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


class Done:
    """The work of an axis of one rank: nothing to wait for."""

    def wait(self) -> None:
        return None


class Ledger:
    """Bytes by (axis, operation), counted where they are handed to `torch.distributed`."""

    def __init__(self) -> None:
        self._open: list[Counter[tuple[str, str]]] = []

    @contextmanager
    def recording(self) -> Iterator[Counter[tuple[str, str]]]:
        """Count what happens inside the `with` block; recordings may be nested."""
        counter: Counter[tuple[str, str]] = Counter()
        self._open.append(counter)
        try:
            yield counter
        finally:
            self._open.remove(counter)

    def __reduce__(self) -> str:
        # A function that names the ledger travels to a rank by value. It must meet the rank's own ledger there, not
        # a copy that nothing is written to: so pickle the name and not the object.
        return "ledger"

    def again(self, sent: Counter[tuple[str, str]]) -> None:
        """Count once more what was counted before: a recording of it runs."""
        for counter in self._open:
            counter.update(sent)

    def record(self, key: str, operation: str, payload: Tensor) -> None:
        axis = key.split(":")[0].split(".")[0]  # what stands behind a point is a further group of the same ranks
        for counter in self._open:
            counter[axis, operation] += payload.numel() * payload.element_size()


ledger = Ledger()

# torch renamed two collectives on the way from 2.11 to 2.13.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard_size(total: int, parts: int) -> int:
    """Length of the first shard when `total` is split in `parts`: the ceiling, as `torch.chunk` has it."""
    return -(-total // parts)


# --- operators: what really calls torch.distributed -------------------------------------------------------

# Defined through torch.library itself: its decorator `custom_op` imports the compiler at the first call, which
# would cost every rank over a second. The second function of each pair tells the compiler the result's shape.
_library = torch.library.Library("picotron_mini", "DEF")


_rehearsing = False  # inside `rehearsal`


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside the block operators run also on tensors without memory (fake ones), so that the ledger counts them.

    For a dry run: with torch's fake process group nothing is sent, and all that is left of a collective is its count.
    """
    global _rehearsing
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def define(fn: Callable[..., Any]) -> Callable[..., Any]:
        def without_memory(*args: Any) -> Any:
            return fn(*args) if _rehearsing else fake(*args)

        name = schema.split("(")[0]
        _library.define(schema)
        _library.impl(name, fn, "CompositeExplicitAutograd")
        torch.library.register_fake(f"picotron_mini::{name}", without_memory, lib=_library)
        return getattr(torch.ops.picotron_mini, name).default

    return define


def _same(x: Tensor, key: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operator("all_reduce(Tensor x, str key) -> Tensor", _same)
def _all_reduce(x: Tensor, key: str) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    ledger.record(key, "all_reduce", out)
    dist.all_reduce(out, group=GROUPS[key])
    return out


@_operator("all_reduce_max(Tensor x, str key) -> Tensor", _same)
def _all_reduce_max(x: Tensor, key: str) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    ledger.record(key, "all_reduce", out)
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=GROUPS[key])
    return out


@_operator(
    "all_gather(Tensor x, str key, int size) -> Tensor",
    lambda x, key, size: x.new_empty((size * x.shape[0], *x.shape[1:])),
)
def _all_gather(x: Tensor, key: str, size: int) -> Tensor:
    x = x.detach().contiguous()  # gloo copies in a thread of its own, in which gradients are on
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    ledger.record(key, "all_gather", x)
    _gather(out, x, group=GROUPS[key])
    return out


@_operator(
    "reduce_scatter(Tensor x, str key, int size) -> Tensor",
    lambda x, key, size: x.new_empty((x.shape[0] // size, *x.shape[1:])),
)
def _reduce_scatter(x: Tensor, key: str, size: int) -> Tensor:
    x = x.detach().contiguous()  # gloo copies in a thread of its own, in which gradients are on
    out = x.new_empty((x.shape[0] // size, *x.shape[1:]))
    ledger.record(key, "reduce_scatter", x)
    _scatter(out, x, group=GROUPS[key])
    return out


@_operator("all_to_all(Tensor x, str key) -> Tensor", _same)
def _all_to_all(x: Tensor, key: str) -> Tensor:
    x = x.detach().contiguous()  # gloo copies in a thread of its own, in which gradients are on
    out = torch.empty_like(x)
    ledger.record(key, "all_to_all", x)
    dist.all_to_all_single(out, x, group=GROUPS[key])
    return out


# --- plain collectives ------------------------------------------------------------------------------------


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; every rank gets the sum. A new tensor, or x itself on an axis of one rank."""
    return x if axis.size == 1 else _all_reduce(x, axis.key)


def all_reduce_max(x: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum over the axis, as `all_reduce` is the sum. Has no gradient."""
    return x if axis.size == 1 else _all_reduce_max(x.detach(), axis.key)


def all_gather(x: Tensor, axis: Axis, dim: int, total: int | None = None) -> Tensor:
    """Concatenate the ranks' shards along `dim`; every rank gets the whole.

    Args:
        total: length of the whole along `dim`, where the shards are uneven (as `torch.chunk` splits). Shards
            are then padded to the first one's length, since the single-tensor all_gather wants equal ones; padding
            counts.
    """
    if axis.size == 1:
        return x
    x = x.movedim(dim, 0)
    if total is not None:
        missing = shard_size(total, axis.size) - x.shape[0]
        x = torch.cat([x, x.new_zeros((missing, *x.shape[1:]))])
    return _all_gather(x, axis.key, axis.size)[:total].movedim(0, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sum over the axis; each rank keeps its own equal part of `dim`.

    Raises:
        ValueError: the axis' size does not divide `dim`.
    """
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"reduce_scatter: {axis.name}={axis.size} does not divide {x.shape[dim]}; pad it first")
    return _reduce_scatter(x.movedim(dim, 0), axis.key, axis.size).movedim(0, dim)


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Send part j of dim 0 to rank j; receive their parts for this rank, in rank order.

    Raises:
        ValueError: the axis' size does not divide dim 0.
    """
    if axis.size == 1:
        return x
    if x.shape[0] % axis.size:
        raise ValueError(f"all_to_all: {axis.name}={axis.size} does not divide {x.shape[0]}; pad it first")
    return _all_to_all(x, axis.key)


@torch.no_grad()
def broadcast(x: Tensor, axis: Axis, root: int = 0) -> Tensor:
    """Overwrite x on every rank of the axis with that of coordinate `root`. In place; the root's bytes count."""
    if axis.size > 1:
        if axis.index == root:
            ledger.record(axis.key, "broadcast", x)
        dist.broadcast(x, src=axis.ranks[root], group=axis.group)
    return x


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


# --- asynchronous -----------------------------------------------------------------------------------------


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
    return _started(_gather(out.detach().view(-1), x.detach().view(-1), group=axis.group, async_op=True))


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
    return _started(_scatter(out.detach().view(-1), x.detach().view(-1), group=axis.group, async_op=True))


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


# --- conjugate pairs --------------------------------------------------------------------------------------


class _CopyTo(Function):
    @staticmethod
    def forward(ctx, x, key):  # type: ignore[no-untyped-def]
        ctx.key = key
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _all_reduce(grad, ctx.key), None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx, x, key):  # type: ignore[no-untyped-def]
        return _all_reduce(x, key)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


class _Exchange(Function):
    @staticmethod
    def forward(ctx, x, key):  # type: ignore[no-untyped-def]
        ctx.key = key
        return _all_to_all(x, key)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _all_to_all(grad, ctx.key), None


def exchange(x: Tensor, axis: Axis) -> Tensor:
    """all_to_all with a gradient: what came from rank j has its gradient sent back to rank j, by an all_to_all.

    Args:
        x: dim 0 is one part for each rank of the axis, and a multiple of its size.
    """
    return x if axis.size == 1 else _Exchange.apply(x, axis.key)


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Use one replicated x on every rank of the axis: identity forward, all_reduce of the gradient backward."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis.key)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Add up the ranks' partial results: all_reduce forward, identity backward."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis.key)


# Both work along dim 0, and what puts another dim there stands outside. When it stood inside and had nothing to do,
# code compiled by torch 2.11 lost the gradient of a gather, without a word.
class _GatherFrom(Function):
    @staticmethod
    def forward(ctx, x, key, size):  # type: ignore[no-untyped-def]
        ctx.key, ctx.size = key, size
        return _all_gather(x, key, size)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _reduce_scatter(grad, ctx.key, ctx.size), None, None


class _ScatterTo(Function):
    @staticmethod
    def forward(ctx, x, key, size):  # type: ignore[no-untyped-def]
        ctx.key, ctx.size = key, size
        return _reduce_scatter(x, key, size)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _all_gather(grad, ctx.key, ctx.size), None, None


def gather_from(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Use the whole of what is cut along `dim`: all_gather forward, reduce_scatter of the gradient backward."""
    if axis.size == 1:
        return x
    whole = _GatherFrom.apply(x.movedim(dim, 0), axis.key, axis.size).movedim(0, dim)
    return whole.contiguous()  # else each product that follows would make, and keep, a copy in order of its own


def scatter_to(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Add up partial results and keep this rank's part of `dim`: reduce_scatter forward, all_gather backward.

    The axis' size must divide `dim`.
    """
    return x if axis.size == 1 else _ScatterTo.apply(x.movedim(dim, 0), axis.key, axis.size).movedim(0, dim)
