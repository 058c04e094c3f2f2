"""All-reduce three times, from nothing but send and receive: what a backend does when it is asked for a sum.

n ranks, S bytes each, and at the end everyone has the sum of all. A message of M bytes takes

    latency + M / bandwidth          (the alpha-beta model: alpha = latency, beta = 1 / bandwidth)

    naive     everyone sends everything to everyone           1 step,          (n - 1) S bytes a rank
    ring      S is cut into n parts that travel in a circle   2 (n - 1) steps, 2 (n - 1)/n S bytes a rank
    tree      pairs, then pairs of pairs, and back            2 log2 n steps,  up to log2 n S bytes a rank

The ring of 4, first half (reduce-scatter). Rank r sends a part to the right and adds what comes from the left, and
a part that has come around holds everyone's share:

    rank 0   [a0] b0  c0  d0        step 0 sends a0 b1 c2 d3, each to the right
    rank 1    a1 [b1] c1  d1        step 1 sends d0+d3, a0+a1, b1+b2, c2+c3
    rank 2    a2  b2 [c2] d2        step 2 sends sums of three; now each rank holds one part that is whole
    rank 3    a3  b3  c3 [d3]

The second half (all-gather) sends the whole parts around the same way. Each rank sends 2 (n - 1) messages of S/n:
about 2S, however many ranks there are, which is the least that the busiest rank of any all-reduce must send. The tree
sends more along its longest path and waits less often: it wins where messages are small.

Paper: bandwidth-optimal all-reduce by Patarasuk and Yuan (2009); two trees at once, which have the ring's bandwidth,
by Sanders, Speck and Träff (2009).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..collectives import receive, send
from ..mesh import Axis


def naive_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis: everyone sends all of it to everyone. A new tensor of x's shape and dtype."""
    others = [rank for rank in range(axis.size) if rank != axis.index]
    arrived = {rank: torch.empty_like(x) for rank in others}
    works = [send(x, axis, rank) for rank in others] + [receive(arrived[rank], axis, rank) for rank in others]
    for work in works:
        work.wait()
    arrived[axis.index] = x
    # in rank order, so that every rank adds in the same order and gets the same bits
    return torch.stack([arrived[rank] for rank in range(axis.size)]).sum(0)


def ring_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis, by a ring. A new tensor of x's shape and dtype.

    Args:
        x: the axis' size must divide its dim 0.
    """
    n, r = axis.size, axis.index
    out = x.clone(memory_format=torch.contiguous_format)
    parts = out.chunk(n)  # views: what is written into them is written into out
    arrived = torch.empty_like(parts[0])

    def shift(outgoing: Tensor, incoming: Tensor) -> None:
        works = [send(outgoing, axis, (r + 1) % n), receive(incoming, axis, (r - 1) % n)]
        for work in works:
            work.wait()

    for step in range(n - 1):  # reduce-scatter
        shift(parts[(r - step) % n], arrived)
        parts[(r - step - 1) % n].add_(arrived)
    for step in range(n - 1):  # all-gather: rank r starts with part r + 1, the one that it has whole
        shift(parts[(r + 1 - step) % n], parts[(r - step) % n])
    return out


def tree_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis: up a binomial tree to rank 0, and down again. A new tensor of x's shape and dtype."""
    n, r = axis.size, axis.index
    out = x.clone(memory_format=torch.contiguous_format)
    arrived = torch.empty_like(out)
    distances = [2**k for k in range((n - 1).bit_length())]  # 1, 2, 4, ... below n
    for d in distances:  # up: of each pair d apart the right one sends, and is done
        if r % (2 * d) == d:
            send(out, axis, r - d).wait()
        elif r % (2 * d) == 0 and r + d < n:
            receive(arrived, axis, r + d).wait()
            out += arrived
    for d in reversed(distances):  # down: the sum goes the same way back
        if r % (2 * d) == 0 and r + d < n:
            send(out, axis, r + d).wait()
        elif r % (2 * d) == d:
            receive(out, axis, r - d).wait()
    return out


def ring_seconds(size: float, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds that the model gives a ring.

    Args:
        size: bytes of the tensor.
        latency: seconds of an empty message.
        bandwidth: bytes a second over one link.
    """
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)


def tree_seconds(size: float, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds that the model gives a tree; arguments as of `ring_seconds`."""
    return 2 * math.ceil(math.log2(ranks)) * (latency + size / bandwidth)
