"""Tensor parallelism that does not wait: the exchanges travel while products are computed.

In `tensor.py` each exchange is waited for before the next product starts, four times a layer. But a product over tokens
falls apart into parts of the tokens, and a backward into two products of which only one is in a hurry:

    exit      forward    y_1 = h_1 W' | y_2 = h_2 W' | y_3 = h_3 W'            h, y in parts of the tokens
                          sum y_1     | sum y_2      | sum y_3                 only the last sum is waited for

    entry     backward   dx = dy W    | dW = dy' x                             dx goes up the chain, dW to the optimizer
                                       sum dx                                  behind dW, so mostly hidden

With sequence parallelism the entry's forward and the exit's backward gather tokens. They do it in parts too: all
gathers are started, and the product of a part runs while the next parts arrive.

    entry     forward     gather x_1  | gather x_2   | gather x_3
                                      | x_1 W'       | x_2 W'   | x_3 W'

To have dx before dW the linear layers of a pair's entry (q, k, v; or gate, up) are one autograd function. The same
sums as before, in the same bytes: 1 / parts of an exchange is exposed where all of it was, if links are no slower than
the products. Many parts make small products, which a GPU computes less well, and pay the latency each.

Papers: asynchronous tensor parallelism, Wang et al. (ASPLOS 2023); the order of dx and dW is Megatron-LM's. PyTorch's
own: `torch.distributed._symmetric_memory` with a micro-pipeline of the compiler.
Legend: B batch, T tokens, D width, F outputs of a rank's part of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..collectives import all_gather_async, all_reduce_async, reduce_scatter_async
from ..layout import split
from ..mesh import Axis, axis_with_key


def overlap(pair: nn.Module, enter: Sequence[str], leave: str, axis: Axis, parts: int, sequence_parallel: bool) -> None:
    """Add the exchanges to one pair of layers, in place, in `parts` parts.

    Args:
        pair: attention or MLP, its weights cut already.
        enter: names of the linear layers that take the pair's input, in the order in which it calls them.
        leave: name of the linear layer that makes its output.
        sequence_parallel: input and output are a rank's run of the tokens, [B, T/tp, D], not [B, T, D].
    """
    layers = [pair.get_submodule(name) for name in enter]
    ready: list[Tensor] = []  # what the layers of the entry have computed and not handed out

    @torch.compiler.disable
    def entry(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        weights = [layer.get_parameter("weight") for layer in layers]
        whole, *ready[:] = _Enter.apply(axis.key, parts, sequence_parallel, inputs[0], *weights)
        return whole, *inputs[1:]

    @torch.compiler.disable
    def hand_out(x: Tensor) -> Tensor:
        return ready.pop(0)

    last = pair.get_submodule(leave)

    @torch.compiler.disable
    def exit_(h: Tensor) -> Tensor:
        return _Leave.apply(axis.key, parts, sequence_parallel, h, last.get_parameter("weight"))

    pair.register_forward_pre_hook(entry)
    for layer in layers:
        layer.forward = hand_out
    last.forward = exit_


class _Enter(Function):
    """x -> (all of x, x W1', x W2', ...); the first without a gradient of its own, for its shape."""

    @staticmethod
    def forward(ctx, key, parts, sequence_parallel, x, *weights):  # type: ignore[no-untyped-def]
        ctx.axis, ctx.sequence_parallel = axis_with_key(key), sequence_parallel
        if sequence_parallel:
            x, products = _gather(x, ctx.axis, parts, weights)
        else:
            x, products = x.view_as(x), [F.linear(x, weight) for weight in weights]  # [B, T, F] each
        ctx.save_for_backward(x, *weights)
        ctx.mark_non_differentiable(x)
        return x, *products

    @staticmethod
    def backward(ctx, _, *dys):  # type: ignore[no-untyped-def]
        x, *weights = ctx.saved_tensors
        dys = tuple(dy.flatten(0, 1) for dy in dys)  # [B T, F] each
        dx = dys[0] @ weights[0]  # this rank's share: [B T, D]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        total = dx
        if ctx.sequence_parallel:
            total = dx.new_empty((dx.shape[0] // ctx.axis.size, dx.shape[1]))
            work = reduce_scatter_async(total, dx, ctx.axis)
        else:
            work = all_reduce_async(dx, ctx.axis)
        wanted, batch, x = ctx.needs_input_grad[4:], len(x), x.flatten(0, 1)
        dws = [_weight_gradient(dy, x) if want else None for dy, want in zip(dys, wanted, strict=True)]
        work.wait()
        return None, None, None, total.unflatten(0, (batch, -1)), *dws


class _Leave(Function):
    """h -> the sum over ranks of h W'; with sequence parallelism this rank's tokens of it."""

    @staticmethod
    def forward(ctx, key, parts, sequence_parallel, h, weight):  # type: ignore[no-untyped-def]
        axis = axis_with_key(key)
        ctx.axis, ctx.parts, ctx.sequence_parallel = axis, parts, sequence_parallel
        ctx.save_for_backward(h, weight)
        ranks = axis.size if sequence_parallel else 1
        shares = h.flatten(0, 1).unflatten(0, (ranks, -1))  # [ranks, B T/ranks, F]
        out, under_way = [], []
        for piece in _pieces(shares.shape[1], parts):
            y = F.linear(shares[:, piece].flatten(0, 1), weight)  # of each rank's tokens the same piece
            out.append(y.new_empty((y.shape[0] // ranks, *y.shape[1:])) if sequence_parallel else y)
            under_way.append(reduce_scatter_async(out[-1], y, axis) if sequence_parallel else all_reduce_async(y, axis))
        for work in under_way:
            work.wait()
        return torch.cat(out).unflatten(0, (len(h), -1))

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        h, weight = ctx.saved_tensors
        if ctx.sequence_parallel:
            dy, (dh,) = _gather(dy, ctx.axis, ctx.parts, [weight.T])
        else:
            dh = dy @ weight
        return (
            None,
            None,
            None,
            dh,
            (_weight_gradient(dy.flatten(0, 1), h.flatten(0, 1)) if ctx.needs_input_grad[4] else None),
        )


def _gather(x: Tensor, axis: Axis, parts: int, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All ranks' tokens of x [B, T/tp, D] as [B, T, D], and its product with each weight [F, D], part by part."""
    rows = x.flatten(0, 1)  # [B T/tp, D]
    pieces = _pieces(len(rows), parts)
    buffers = [x.new_empty((axis.size, piece.stop - piece.start, x.shape[2])) for piece in pieces]
    works = [all_gather_async(buffer, rows[piece], axis) for buffer, piece in zip(buffers, pieces, strict=True)]
    products: list[list[Tensor]] = [[] for _ in weights]
    for buffer, work in zip(buffers, works, strict=True):
        work.wait()
        for product, weight in zip(products, weights, strict=True):
            product.append(F.linear(buffer, weight))  # [tp, B T/tp/parts, F]
    whole, *wholes = (torch.cat(of, dim=1).view(len(x), -1, of[0].shape[2]) for of in (buffers, *products))
    return whole, wholes


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW [F, D] of y = x W' from dy [B T, F] and x [B T, D]."""
    return dy.T @ x


def _pieces(tokens: int, parts: int) -> list[slice]:
    return [slice(start, stop) for start, stop in split(tokens, parts) if start < stop]
