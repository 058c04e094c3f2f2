"""Sum gradients inside each host first, so that little of them has to leave it.

Ranks of one host are joined by fast links, hosts by slow ones. An all_reduce that knows of neither hands all N bytes
to whatever is between the ranks. But a sum may be nested: first the ranks of a host, then the hosts. And the second
sum can be shared out: each of the g ranks of a host takes a g-th of the entries, and meets only the rank that has the
same entries on each other host. With n = 4 ranks, g = 2 of a host, and entries a b c d (a_r: of rank r):

                          host 0                            host 1
                  rank 0          rank 1            rank 2          rank 3
    at first      a0 b0 c0 d0     a1 b1 c1 d1       a2 b2 c2 d2     a3 b3 c3 d3
    1 inside      a01 b01         c01 d01           a23 b23         c23 d23         reduce_scatter of N
    2 across      a0123 b0123     c0123 d0123       a0123 b0123     c0123 d0123     all_reduce of N/g: 0-2 and 1-3
    3 inside      a b c d         a b c d           a b c d         a b c d         all_gather of N/g: all the sums

The same sum, in another order of additions.

Bytes a step in payload, for a bucket of N bytes (padded to a multiple of g entries):

    at once            all_reduce N                       over the n ranks
    in three           reduce_scatter N, all_gather N/g   over the g ranks of a host
                       all_reduce N/g                     over the n/g hosts: all that a rank sends to other hosts

Each rank hands over more than before, N (1 + 2/g) in place of N, and a g-th of N to the slow links. All g ranks use
these at the same time: a host that has one card for each rank uses them all.

What is gained depends on what it is compared with. A ring in which a single link leaves each host carries 2N (n-1)/n
over that link; here it is 2N/g (h-1)/h a rank, with h = n/g hosts. A library that knows the hosts (NCCL does) may lay
a ring over each card and send hardly more than that; then fewer steps one behind the other are left to gain. Measure
it on your links.

No memory is needed but for a padded copy, where g does not divide a bucket: a rank's part is a view of the buffer.

Papers: 2D-torus all-reduce, the same three steps (arXiv 1811.05233). ZeRO in groups puts the optimizer between the
second and the third (`zero.py`; FSDP, arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import Work, all_gather_async, all_reduce_async, reduce_scatter_async
from ..mesh import Axis


class Hierarchical:
    """Sums buckets in three exchanges: a `compress.Reduce`, as `GradientBuckets` takes it.

    Args:
        inside: the ranks of this rank's host.
        across: the ranks that have this one's place on every host. Both are of `Mesh.halves`.
    """

    def __init__(self, inside: Axis, across: Axis) -> None:
        self.inside, self.across = inside, across
        self.side: torch.cuda.Stream | None = None

    def __call__(self, buffer: Tensor, sizes: Sequence[int]) -> Work:
        """Start summing `buffer` over all ranks, in place; it holds the sum after `wait()`."""
        whole = _padded(buffer, self.inside.size)
        if not buffer.is_cuda:
            return _Sum(buffer, whole, self.inside, self.across)
        # NCCL's `wait()` lets the current stream wait, not the host. On a stream of their own the three wait for each
        # other, and backward goes on. One stream for all buckets: their exchanges run one after the other, in one order
        # on all ranks. Two groups of one GPU whose exchanges run in an order of each rank's own may block each other.
        compute = torch.cuda.current_stream(buffer.device)
        self.side = self.side or torch.cuda.Stream(buffer.device)
        self.side.wait_stream(compute)  # the gradients are there
        with torch.cuda.stream(self.side):
            under_way = _Sum(buffer, whole, self.inside, self.across)
            under_way.wait()
            return _Event(self.side.record_event(), under_way)


class _Sum:
    """The first exchange has started; `wait()` makes the others."""

    def __init__(self, buffer: Tensor, whole: Tensor, inside: Axis, across: Axis) -> None:
        self.buffer, self.whole, self.inside, self.across = buffer, whole, inside, across
        # [N/g], a view of this rank's own part: there, and nowhere else in the input, NCCL may put the output
        self.part = whole.view(inside.size, -1)[inside.index]
        self.work = reduce_scatter_async(self.part, whole, inside)

    def wait(self) -> None:
        self.work.wait()
        all_reduce_async(self.part, self.across).wait()
        all_gather_async(self.whole, self.part, self.inside).wait()
        if self.whole is not self.buffer:
            self.buffer.copy_(self.whole[: len(self.buffer)])


class _Event:
    """What a side stream will have done at an event; `wait()` lets the current stream wait for it."""

    def __init__(self, event: torch.cuda.Event, kept: _Sum) -> None:
        # kept: a padded copy is of the compute stream's memory, which may have it back once that stream has waited
        self.event, self.kept = event, kept

    def wait(self) -> None:
        torch.cuda.current_stream(self.kept.buffer.device).wait_event(self.event)


def _padded(buffer: Tensor, parts: int) -> Tensor:
    """The buffer itself, or where `parts` does not divide its length, a copy with zeros behind."""
    missing = -len(buffer) % parts
    return torch.cat([buffer, buffer.new_zeros(missing)]) if missing else buffer
