"""Conjugate pairs: functions whose gradient is another collective. Tensor parallelism is made of them.

    forward                                   backward
    copy_to      x on every rank              all_reduce the gradients (each rank used its own copy of x)
    reduce_from  all_reduce the partial sums  copy: the derivative of a sum hands each term the gradient
    gather_from  all_gather the shards        reduce_scatter the gradients: each rank used all of x
    scatter_to   reduce_scatter partial sums  all_gather the gradients
    exchange     all_to_all                   all_to_all: each part's gradient goes back where the part came from

Swap two and the model still runs, still learns a little, and is wrong (Megatron-LM, arXiv 1909.08053).
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function

from ..mesh import Axis
from . import operators


class _CopyTo(Function):
    @staticmethod
    def forward(ctx, x, key):  # type: ignore[no-untyped-def]
        ctx.key = key
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return operators.all_reduce(grad, ctx.key), None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx, x, key):  # type: ignore[no-untyped-def]
        return operators.all_reduce(x, key)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


class _Exchange(Function):
    @staticmethod
    def forward(ctx, x, key):  # type: ignore[no-untyped-def]
        ctx.key = key
        return operators.all_to_all(x, key)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return operators.all_to_all(grad, ctx.key), None


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
        return operators.all_gather(x, key, size)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return operators.reduce_scatter(grad, ctx.key, ctx.size), None, None


class _ScatterTo(Function):
    @staticmethod
    def forward(ctx, x, key, size):  # type: ignore[no-untyped-def]
        ctx.key, ctx.size = key, size
        return operators.reduce_scatter(x, key, size)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return operators.all_gather(grad, ctx.key, ctx.size), None, None


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
