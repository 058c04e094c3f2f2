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

A gather of a part puts the ranks' rows of it one behind the other. So that they lie where they belong as they arrive,
it is each part of the flattened tokens that is cut over the ranks (`by_rows`), and not the whole. With 2 parts, tp=2:

    tokens        0  1  2  3  4  5 |  6  7  8  9 10 11
                  part 1           |  part 2                      rank 0 has 0 1 2 and 6 7 8 between the pairs

Then nothing is ever put together or in order: each product is written into its rows of the result.

To have dx before dW the linear layers of a pair's entry (q, k, v; or gate, up) are one autograd function. What waits
inside of it is an operator to the compiler, like each collective, so a block is compiled as one graph. The same sums as
before, in the same bytes: 1 / parts of an exchange is exposed where all of it was, if links are no slower than the
products. Many parts make small products, which a GPU computes less well, and pay the latency each.

With sequence parallelism tokens may be read instead of sent, out of symmetric memory (collectives/symmetric.py): on a
GPU copy engines do that, and take no multiprocessor from the products.

Papers: asynchronous tensor parallelism, Wang et al. (ASPLOS 2023); the order of dx and dW is Megatron-LM's. PyTorch's
own: `torch.distributed._symmetric_memory` with a micro-pipeline of the compiler.
Legend: B batch, T tokens, D width, F outputs of a rank's part of a weight, N = B T, n rows between the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..collectives import SymmetricMemory, Work, all_gather_async, all_reduce_async, reduce_scatter_async
from ..collectives.operators import operator
from ..layout import split
from ..mesh import Axis, axis_with_key

_MEMORY: dict[str, SymmetricMemory] = {}  # by axis, of which an operator knows the key


def overlap(
    pair: nn.Module, enter: Sequence[str], leave: str, axis: Axis, parts: int, sequence_parallel: bool,
    memory: SymmetricMemory | None = None,
) -> None:  # fmt: skip
    """Add the exchanges to one pair of layers, in place, in `parts` parts.

    Args:
        pair: attention or MLP, its weights cut already.
        enter: names of the linear layers that take the pair's input, in the order in which it calls them.
        leave: name of the linear layer that makes its output.
        sequence_parallel: input and output are a rank's rows of each part of the tokens, [B, T/tp, D], not [B, T, D].
        memory: of the axis, through which tokens are gathered and summed then, with `sequence_parallel`; for all pairs.
    """
    _MEMORY.pop(axis.key, None)
    if memory and sequence_parallel:
        _MEMORY[axis.key] = memory

    def entry(pair: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        layers = [pair.get_submodule(name) for name in enter]
        weights = [layer.get_parameter("weight") for layer in layers]
        products = _Enter.apply(axis.key, parts, sequence_parallel, inputs[0], *weights)
        for layer, product in zip(layers, products, strict=True):
            layer.product = product
        return products[0], *inputs[1:]  # in place of all of x, of which no more than B and T are asked for

    def exit_(last: nn.Module, h: Tensor) -> Tensor:
        return _Leave.apply(axis.key, parts, sequence_parallel, h, last.get_parameter("weight"))

    pair.register_forward_pre_hook(entry)
    for name in enter:
        _replace_forward(pair.get_submodule(name), _hand_out)
    _replace_forward(pair.get_submodule(leave), exit_)


def _replace_forward(layer: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    layer.forward = lambda x: forward(layer, x)  # a plain function, so that the compiler sees all layers as alike


def _hand_out(layer: nn.Module, x: Tensor) -> Tensor:
    """What the pair's entry has computed for this layer already."""
    product = layer.product
    assert isinstance(product, Tensor)
    del layer.product
    return product


class _Enter(Function):
    """x [B, T, D], or the rank's rows [B, T/tp, D] of it -> x W1', x W2', ...: [B, T, F] each."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        # not `ctx, key, ..., *weights`: with two weights the compiler would take the context for left out
        key, parts, sequence_parallel, x, *weights = inputs
        ctx.how = key, parts, sequence_parallel
        rows = x.flatten(0, 1)
        if sequence_parallel:
            rows, *products = _gather_and_multiply(rows, weights, key, parts)
        else:
            products = [rows @ weight.T for weight in weights]
        ctx.save_for_backward(rows, *weights)
        return tuple(product.unflatten(0, (len(x), -1)) for product in products)

    @staticmethod
    def backward(ctx, *dys):  # type: ignore[no-untyped-def]
        rows, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        found = iter(_enter_backward([dy.flatten(0, 1) for dy in dys], rows, weights, *ctx.how, wanted))
        dx, *dws = [next(found) if want else None for want in wanted]
        return None, None, None, dx if dx is None else dx.unflatten(0, (len(dys[0]), -1)), *dws


class _Leave(Function):
    """h [B, T, F] -> the sum over ranks of h W', [B, T, D]; with sequence parallelism this rank's rows [B, T/tp, D]."""

    @staticmethod
    def forward(ctx, key, parts, sequence_parallel, h, weight):  # type: ignore[no-untyped-def]
        ctx.how = key, parts, sequence_parallel
        rows = h.flatten(0, 1)
        ctx.save_for_backward(rows, weight)
        return _multiply_and_sum(rows, weight, *ctx.how).unflatten(0, (len(h), -1))

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        rows, weight = ctx.saved_tensors
        key, parts, sequence_parallel = ctx.how
        batch, dy = len(dy), dy.flatten(0, 1)
        if sequence_parallel:
            dy, dh = _gather_and_multiply(dy, [weight.T], key, parts)
        else:
            dh = dy @ weight
        dw = _weight_gradient(dy, rows) if ctx.needs_input_grad[4] else None
        return None, None, None, dh.unflatten(0, (batch, -1)), dw


def _size(key: str) -> int:
    return key.count(",") + 1


@operator(
    "gather_and_multiply(Tensor x, Tensor[] weights, str key, int parts) -> Tensor[]",
    lambda x, weights, key, _: [x.new_empty((len(x) * _size(key), n)) for n in (x.shape[1], *map(len, weights))],
)
def _gather_and_multiply(x: Tensor, weights: Sequence[Tensor], key: str, parts: int) -> list[Tensor]:
    """All ranks' rows of x [n, D] as [N, D], and its product [N, F] with each weight [F, D], part by part."""
    axis, x = axis_with_key(key), x.contiguous()
    whole, *products = [x.new_empty((len(x) * axis.size, n)) for n in (x.shape[1], *map(len, weights))]
    pieces = _pieces(len(x), parts, axis.size)
    memory = _MEMORY.get(key)
    if memory:
        shared = memory.empty(x.numel(), x.dtype)
        rows = shared.view_as(x).copy_(x)
        works = [memory.all_gather_several([whole[of_all].view(-1)], [rows[mine].view(-1)], fresh=n == 0)
                 for n, (mine, of_all) in enumerate(pieces)]  # fmt: skip
        read = memory.all_have_read(shared)
    else:
        works = [all_gather_async(whole[of_all], x[mine], axis) for mine, of_all in pieces]
    for (_, of_all), work in zip(pieces, works, strict=True):
        work.wait()
        for product, weight in zip(products, weights, strict=True):
            torch.mm(whole[of_all], weight.T, out=product[of_all])
    if memory:
        read.wait()
        memory.give_back(shared)
    return [whole, *products]


@operator(
    "multiply_and_sum(Tensor h, Tensor weight, str key, int parts, bool sequence_parallel) -> Tensor",
    lambda h, weight, key, _, rows_only: h.new_empty((len(h) // (_size(key) if rows_only else 1), len(weight))),
)
def _multiply_and_sum(h: Tensor, weight: Tensor, key: str, parts: int, sequence_parallel: bool) -> Tensor:
    """The sum over ranks of h W' [N, D] from h [N, F] and weight [D, F], part by part; or the rank's rows of it."""
    axis = axis_with_key(key)
    ranks = axis.size if sequence_parallel else 1
    out = h.new_empty((len(h) // ranks, len(weight)))
    shares = _room(h, len(h), len(weight), axis) if sequence_parallel else out
    works = []
    for mine, of_all in _pieces(len(out), parts, ranks):
        share = torch.mm(h[of_all], weight.T, out=shares[of_all])
        works.append(_sum(out[mine], share, axis, sequence_parallel))
    _wait(works, shares, axis)
    return out


def _shapes_of_gradients(
    dys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], key: str, parts: int, rows_only: bool, wanted: Any
) -> list[Tensor]:
    dx = x.new_empty((len(x) // (_size(key) if rows_only else 1), x.shape[1]))
    return [torch.empty_like(each) for each, want in zip((dx, *weights), wanted, strict=True) if want]


@operator(
    "enter_backward(Tensor[] dys, Tensor x, Tensor[] weights, str key, int parts, bool rows_only, bool[] wanted)"
    " -> Tensor[]",
    _shapes_of_gradients,
)
def _enter_backward(
    dys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], key: str, parts: int, sequence_parallel: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Those that are wanted of dx, summed over ranks, [N, D] or the rank's rows of it, and of each dW [F, D]."""
    axis, out, works = axis_with_key(key), list[Tensor](), list[Work]()
    ranks = axis.size if sequence_parallel else 1
    if wanted[0]:
        dx = _room(x, len(dys[0]), x.shape[1], axis) if sequence_parallel else x.new_empty(len(dys[0]), x.shape[1])
        torch.mm(dys[0], weights[0], out=dx)  # this rank's share: [N, D]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        out = [dx.new_empty((len(dx) // ranks, dx.shape[1])) if sequence_parallel else dx]
        for mine, of_all in _pieces(len(out[0]), parts if sequence_parallel else 1, ranks):
            works.append(_sum(out[0][mine], dx[of_all], axis, sequence_parallel))
    out += [_weight_gradient(dy, x) for dy, want in zip(dys, wanted[1:], strict=True) if want]
    if wanted[0]:
        _wait(works, dx, axis)
    return out


def _room(like: Tensor, rows: int, columns: int, axis: Axis) -> Tensor:
    """For a rank's shares of sums [rows, columns], where the other ranks find them."""
    memory = _MEMORY.get(axis.key)
    return memory.empty(rows * columns, like.dtype).view(rows, -1) if memory else like.new_empty((rows, columns))


def _sum(out: Tensor, share: Tensor, axis: Axis, sequence_parallel: bool) -> Work:
    """Start adding up the ranks' shares [rows, D]: in place, or with sequence parallelism this rank's rows into out."""
    memory = _MEMORY.get(axis.key)
    if memory and sequence_parallel:
        return memory.reduce_scatter_several([out.view(-1)], [share.view(-1)])
    return reduce_scatter_async(out, share, axis) if sequence_parallel else all_reduce_async(share, axis)


def _wait(works: Sequence[Work], shares: Tensor, axis: Axis) -> None:
    """... for sums, until when their shares must live."""
    for work in works:
        work.wait()
    memory = _MEMORY.get(axis.key)
    if memory:
        memory.give_back(shares.view(-1))


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW [F, D] of y = x W' from dy [N, F] and x [N, D]."""
    return dy.T @ x


def _pieces(rows: int, parts: int, ranks: int) -> list[tuple[slice, slice]]:
    """The parts of a rank's rows, each with where the rows of all ranks begin and end in the whole."""
    return [(slice(a, b), slice(a * ranks, b * ranks)) for a, b in split(rows, parts) if a < b]
