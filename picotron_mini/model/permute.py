"""Rows on their way: taken from tokens in the order of their experts, brought back, weighed, added up.

A mixture multiplies sorted rows, and tokens are not sorted. What lies between costs no flops and much memory traffic,
so it is counted in passes over [M, D]. Two lists say everything, each the inverse of the other:

    token [M]       the token of each row              rows[m] = x[token[m]]
    place [N, K]    the row of each choice, -1: none   y[t] = sum_k w[t, k] rows[place[t, k]]

Left to autograd, the gradient of `x[token]` adds each row to the place where it came from. Several rows have the same
token, so a GPU sorts them or lets them queue for it. But where a token's rows are is known: it is `place`. So the
gradient *gathers* too, and every output is written once, by whoever computes it:

    rows = x[token]                     dx[t]    = sum_k drows[place[t, k]]
    y[t] = sum_k w_tk rows[place_tk]    drows[m] = w_m dy[token[m]]        dw_m = <dy[token[m]], rows[m]>

The rows stay in the dtype of the compute. Sums over k, and the products with the weights, are made in float32 at least
and rounded once: compiled (`fused`), inside one kernel; run eagerly, through copies in float32.

Cost, with rows of w bytes: `take` reads and writes M D w; so does its gradient, but for K reads to one write. The
weighted sum's gradient reads two rows for each that it writes.

Legend: N tokens, D width, E experts, K experts a token, M rows (N K, if no choice was dropped), I inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def sort(experts: Tensor, number: int, rest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put the choices in the order of their experts; those of one expert in the order of tokens.

    Args:
        experts: [N, K] int64, -1: none.
        number: E, below 32,767.
        rest: give the choices of no expert to the last one, where they count for nothing: so N K is how many rows there
            are, and no device has to be asked. Else they come behind all others, where rows may end before them.

    Returns:
        order [N K], the choice of each row; its token [N K]; the place [N, K] of each choice, -1 where it was none;
        how many rows each expert has [E]. All int64.
    """
    key = torch.where(experts < 0, number - 1 if rest else number, experts).flatten()  # [N K]
    # the fewer bits a key has, the fewer passes a radix sort makes
    order = key.to(torch.uint8 if number < 256 else torch.int16).argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = (key == torch.arange(number, device=key.device)[:, None]).sum(1)
    return order, order // experts.shape[1], torch.where(experts < 0, -1, back.view_as(experts)), counts


def add_up(rows: Tensor, place: Tensor) -> Tensor:
    """rows [M, D], place [N, K] -> [N, D], the sum of each token's rows."""
    each = rows.index_select(0, place.clamp(min=0).flatten()).unflatten(0, place.shape)  # [N, K, D]
    return each.masked_fill((place < 0)[..., None], 0.0).sum(1)  # torch adds up narrow numbers in float32


def weigh_up(rows: Tensor, weights: Tensor, place: Tensor) -> Tensor:
    """rows [M, D], weights [N, K], place [N, K] -> [N, D], the weighted sum of each token's rows."""
    weights, place = weights.masked_fill(place < 0, 0.0), place.clamp(min=0)
    each = [rows.index_select(0, place[:, k]) for k in range(place.shape[1])]
    out = each[0] * weights[:, :1]  # of the wider dtype
    for k, more in enumerate(each[1:], 1):
        out = out + more * weights[:, k : k + 1]
    return out.to(rows.dtype)


def weigh_up_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, token: Tensor, place: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient [N, D] of `weigh_up`'s result -> those of rows [M, D] and weights [N, K]."""
    weight = weights.masked_fill(place < 0, 0.0).flatten().index_select(0, order)  # [M]
    grad = grad.index_select(0, token)  # [M, D]
    of_weight = (grad.to(weight.dtype) * rows).sum(1)  # [M]
    of_weights = of_weight.index_select(0, place.clamp(min=0).flatten()).view_as(place).masked_fill(place < 0, 0.0)
    return (grad * weight[:, None]).to(rows.dtype), of_weights


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [M, I] each."""
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [M, I] of `swiglu`'s result -> those of gate and up."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class Passes(NamedTuple):
    """The functions above, as they are or compiled. Plain copying (`index_select`) is one kernel as it is."""

    sort: Callable[[Tensor, int, bool], tuple[Tensor, Tensor, Tensor, Tensor]]
    add_up: Callable[[Tensor, Tensor], Tensor]
    weigh_up: Callable[[Tensor, Tensor, Tensor], Tensor]
    weigh_up_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


PLAIN = Passes(sort, add_up, weigh_up, weigh_up_backward, swiglu, swiglu_backward)


@cache  # one for all layers
def fused() -> Passes:
    """The functions above, each compiled: on a GPU a kernel or two."""
    return Passes(*(compiled(fn) for fn in PLAIN))


@cache
def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` compiled for any number of rows: dim 0 of every tensor that it is given. Its value has no gradient."""
    run = torch.compile(fn, fullgraph=True)

    def call(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(len(tensor) < 2 for tensor in tensors):  # the compiler would make a version of its own for it
            return fn(*args)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return run(*args)

    return call


# --- with gradients ---------------------------------------------------------------------------------------


def take(x: Tensor, token: Tensor, place: Tensor, passes: Passes = PLAIN) -> Tensor:
    """The rows [M, D] of x [N, D].

    Args:
        token: [M] int64, of each row.
        place: [N, K] int64, the rows of each token; -1: none.
    """
    out: Tensor = _Take.apply(x, token, place, passes)
    return out


def gather(rows: Tensor, token: Tensor, place: Tensor, passes: Passes = PLAIN) -> Tensor:
    """The sum [N, D] of each token's rows, of rows [M, D]; the mirror image of `take`."""
    out: Tensor = _Gather.apply(rows, token, place, passes)
    return out


def combine(
    rows: Tensor, weights: Tensor, order: Tensor, token: Tensor, place: Tensor, passes: Passes = PLAIN
) -> Tensor:
    """The weighted sum [N, D] of each token's rows, of rows [M, D].

    Args:
        weights: [N, K], of at least float32.
        order: [M] int64, which choice (t K + k) each row is.
        token, place: as in `take`.
    """
    out: Tensor = _Combine.apply(rows, weights, order, token, place, passes)
    return out


def gated(gate: Tensor, up: Tensor, passes: Passes = PLAIN) -> Tensor:
    """silu(gate) * up; keeps gate and up, where autograd would keep silu(gate) too."""
    out: Tensor = _Gated.apply(gate, up, passes)
    return out


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, passes: Passes) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return _sum(grad, place, ctx.passes), None, None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor, passes: Passes) -> Tensor:
        ctx.save_for_backward(token)
        return _sum(rows, place, passes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None


class _Combine(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, token: Tensor, place: Tensor, passes: Passes
    ) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(rows, weights, order, token, place)
        return passes.weigh_up(rows, weights, place) if len(rows) else rows.new_zeros(len(place), rows.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows, weights, order, token, place = ctx.saved_tensors
        if not len(rows):
            return torch.zeros_like(rows), torch.zeros_like(weights), None, None, None, None
        return *ctx.passes.weigh_up_backward(grad, rows, weights, order, token, place), None, None, None, None


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, passes: Passes) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(gate, up)
        return passes.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.passes.swiglu_backward(grad, *ctx.saved_tensors), None


def _sum(rows: Tensor, place: Tensor, passes: Passes) -> Tensor:
    return passes.add_up(rows, place) if len(rows) else rows.new_zeros(len(place), rows.shape[1])
