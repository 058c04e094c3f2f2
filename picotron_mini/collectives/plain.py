"""Plain collectives: a tensor and an axis, and the result when the call returns.

    all_reduce       everyone gets the sum of all         all_gather       everyone gets all, one behind the other
    reduce_scatter   everyone gets its part of the sum    all_to_all       everyone gets its part of each
    broadcast        everyone gets one rank's             barrier          everyone has come

They have no gradients: see `conjugate` for those. A backward that reaches one gets nothing, and torch warns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Axis
from . import operators
from .counting import ledger


def shard_size(total: int, parts: int) -> int:
    """Length of the first shard when `total` is split in `parts`: the ceiling, as `torch.chunk` has it."""
    return -(-total // parts)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; every rank gets the sum. A new tensor, or x itself on an axis of one rank."""
    return x if axis.size == 1 else operators.all_reduce(x, axis.key)


def all_reduce_max(x: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum over the axis, as `all_reduce` is the sum. Has no gradient."""
    return x if axis.size == 1 else operators.all_reduce_max(x.detach(), axis.key)


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
    return operators.all_gather(x, axis.key, axis.size)[:total].movedim(0, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sum over the axis; each rank keeps its own equal part of `dim`.

    Raises:
        ValueError: the axis' size does not divide `dim`.
    """
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"reduce_scatter: {axis.name}={axis.size} does not divide {x.shape[dim]}; pad it first")
    return operators.reduce_scatter(x.movedim(dim, 0), axis.key, axis.size).movedim(0, dim)


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Send part j of dim 0 to rank j; receive their parts for this rank, in rank order.

    Raises:
        ValueError: the axis' size does not divide dim 0.
    """
    if axis.size == 1:
        return x
    if x.shape[0] % axis.size:
        raise ValueError(f"all_to_all: {axis.name}={axis.size} does not divide {x.shape[0]}; pad it first")
    return operators.all_to_all(x, axis.key)


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
