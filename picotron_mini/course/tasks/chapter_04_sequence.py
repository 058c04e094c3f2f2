"""Exercises of chapter 04, tensor parallelism: norm and MLP where each rank has its own tokens only.

Most mistakes here compute the right rows and a wrong gradient. So an answer is compared with one device in the order
of backward, and the first quantity that is wrong tells which exchange is. The ledger says what a ring would carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ...collectives import all_gather, all_reduce, copy_to, gather_from, ledger, reduce_from, reduce_scatter, scatter_to
from ...launch import RankError
from ...mesh import Axis
from ...parallel.machine import wire_bytes
from ..exercises import Exercise, Mistake, NotAttempted
from .chapter_04 import RANKS, by_factor, near, on_ranks

SIZES = {RANKS: (8, 3, 10), 3: (6, 4, 9)}  # by ranks: T, D, F
Answer = Callable[..., Any]
Exchange = Callable[[Tensor, Axis], Tensor]


def mlp_on_rows_stub(x: Tensor, norm: Tensor, up: Tensor, down: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of down(silu(up(norm(x)))); autograd must find the gradients of one device through it.

    The loss is a sum over the rows of all ranks. Of x, up and down a rank needs the gradient of its own part, and of
    norm the whole gradient.

    Args:
        x: [T/n, D], this rank's rows of the tokens.
        norm: [D], whole and the same on every rank. The norm is `F.rms_norm(x, norm.shape, norm)`.
        up: [F/n, D], this rank's slice of a Linear's weight [F, D].
        down: [D, F/n], this rank's slice of a Linear's weight [D, F].

    Returns:
        [T/n, D]. Write the entry as a `torch.autograd.Function`. There are `all_gather(x, axis, 0)` and
        `reduce_scatter(x, axis, 0)`, for values; and with gradients `scatter_to(x, axis, 0)` and `copy_to(x, axis)`.
        Forward and backward together put no more bytes on a ring's wire than two all_reduces of [T, D] and one of
        [D] do.
    """
    raise NotAttempted


def mlp_on_rows(x: Tensor, norm: Tensor, up: Tensor, down: Tensor, axis: Axis) -> Tensor:
    """The norm sees own rows, so its weight needs a sum; the products see all rows, so theirs do not."""

    class Enter(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return all_gather(x, axis, 0)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return reduce_scatter(gradient, axis, 0)  # each rank has used all rows, so each has a term

    mine = F.rms_norm(x, norm.shape, copy_to(norm, axis))  # [T/n, D]
    rows: Tensor = Enter.apply(mine)  # [T, D]
    return scatter_to(F.silu(rows @ up.T) @ down.T, axis, 0)  # [T/n, D]


# --- mistakes ---------------------------------------------------------------------------------------------


def _as_it_is(x: Tensor, axis: Axis) -> Tensor:
    return x


def _own(x: Tensor, axis: Axis) -> Tensor:
    return x.chunk(axis.size)[axis.index]


def _own_of_sum(x: Tensor, axis: Axis) -> Tensor:
    return _own(all_reduce(x, axis), axis)


def _gather(x: Tensor, axis: Axis) -> Tensor:
    return gather_from(x, axis, 0)


def _scatter(x: Tensor, axis: Axis) -> Tensor:
    return scatter_to(x, axis, 0)


def _entry(back: Exchange) -> Exchange:
    """An entry whose backward is wrong."""

    def enter(x: Tensor, axis: Axis) -> Tensor:
        class Enter(Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return all_gather(x, axis, 0)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return back(gradient, axis)

        out: Tensor = Enter.apply(x)
        return out

    return enter


def _variant(
    enter: Exchange = _gather, leave: Exchange = _scatter, whole: Exchange = copy_to, cut: Exchange = _as_it_is
) -> Answer:
    """The right answer but for the exchange given; `whole` is what is done to norm, and `cut` to up and down."""

    def answer(x: Tensor, norm: Tensor, up: Tensor, down: Tensor, axis: Axis) -> Tensor:
        rows = enter(F.rms_norm(x, norm.shape, whole(norm, axis)), axis)
        return leave(F.silu(rows @ cut(up, axis).T) @ cut(down, axis).T, axis)

    return answer


def _norm_on_all_rows(x: Tensor, norm: Tensor, up: Tensor, down: Tensor, axis: Axis) -> Tensor:
    """Rows gathered before the norm, and copy_to behind it: as plain tensor parallelism, with x cut."""
    rows = F.rms_norm(_entry(_own)(x, axis), norm.shape, norm)
    return _scatter(F.silu(copy_to(rows, axis) @ up.T) @ down.T, axis)


def _weight_behind_entry(x: Tensor, norm: Tensor, up: Tensor, down: Tensor, axis: Axis) -> Tensor:
    rows = _gather(F.rms_norm(x, norm.shape), axis) * norm
    return _scatter(F.silu(rows @ up.T) @ down.T, axis)


_OWN_TERM = (
    "each rank returns what its slices of up and down make of its own rows. That is one term of each row: the entry "
    "has to gather the rows of all ranks, and the exit to add up the terms of each row"
)
_PART = (
    "all is right but the gradient of norm. Each rank has a part of it, and the parts add up to the right one: norm is "
    "whole on every rank, but a rank meets its own tokens with it, or its own slices, so the ranks' gradients of it "
    "must be added up"
)
_WRONG: dict[str, tuple[Answer, str]] = {
    "no entry": (
        _variant(enter=_as_it_is),
        "the exit is given the terms of this rank's rows only, and scatters those. Every rank has another slice of up "
        "and down, so every rank must see all rows: the entry has to gather them",
    ),
    "no exchange": (_variant(enter=_as_it_is, leave=_as_it_is), _OWN_TERM),
    "no exit": (_variant(leave=_own), _OWN_TERM),
    "the pair of before": (
        _variant(enter=copy_to, leave=reduce_from),
        "copy_to and reduce_from are for ranks that hold the same tokens. Here each has rows of its own, so that sum "
        "adds up terms of different tokens: gather the rows first",
    ),
    "all rows returned": (
        _variant(leave=reduce_from),
        "every rank returns all rows: between the pairs a rank keeps its own rows only, so the exit adds up and hands "
        "each rank its part",
    ),
    "all_reduce, then own rows": (
        _variant(leave=lambda x, axis: _own(reduce_from(x, axis), axis)),
        "the value is right, and the gradients of down and of all before it lack the rows of other ranks: this rank's "
        "term of those rows is in their loss, and reduce_from and a slice bring nothing back from there. The backward "
        "of the exit has to gather",
    ),
    "plain reduce_scatter": (
        _variant(leave=lambda x, axis: reduce_scatter(x, axis, 0)),
        "the value is right, and no gradient comes back through the exit: reduce_scatter is for values only; the exit "
        "that carries gradients is scatter_to",
    ),
    "slices summed": (
        _variant(cut=copy_to),
        "the gradients of up and down are added up over the ranks, and these are different slices: each saw all rows, "
        "so its gradient is complete",
    ),
    "own rows of the gradient": (
        _variant(enter=_entry(_own)),
        "the value is right, and so are the gradients of up and down; that of x is not: the entry's backward takes its "
        "own rows of the gradient and leaves out what the other ranks found for them. Every rank has used all rows, so "
        "the ranks' gradients must be added up first",
    ),
    "a mean": (
        _variant(enter=_entry(lambda gradient, axis: reduce_scatter(gradient, axis, 0) / axis.size)),
        "the value is right, and the gradient of x is divided by the number of ranks: the ranks' gradients of the rows "
        "are terms of a sum, not estimates of one thing",
    ),
    "plain all_gather": (
        _variant(enter=lambda x, axis: all_gather(x, axis, 0)),
        "the value is right, and no gradient comes back through the entry to x and norm: all_gather is for values "
        "only, so put it into the forward of a Function, and say in its backward what becomes of the gradient",
    ),
    "summed twice": (
        _variant(enter=lambda x, axis: copy_to(_gather(x, axis), axis)),
        "the value is right, and the gradient of x is multiplied by the number of ranks: it is added up twice. An "
        "entry that gathers adds up in its own backward, and wants no copy_to behind it",
    ),
    "mean of the norm's gradients": (
        _variant(whole=lambda x, axis: copy_to(x / axis.size, axis) + x.detach() * (1 - 1 / axis.size)),
        "the gradient of norm is a mean over the ranks: each has the part of its own tokens, so the parts must be "
        "added",
    ),
}
_SENDS = (
    "all is as on one device, but more is on the wire than plain tensor parallelism puts there. Gather rows once, and "
    "add rows up by reduce_scatter: an all_reduce is that and an all_gather, and whoever then takes its own rows "
    "throws the second half away"
)
_SHAPE = (
    "a backward returned a gradient of another shape than the input of its forward. The entry takes this rank's rows, "
    "[T/n, D], and is handed the gradient of all rows, [T, D]: add up over the ranks and return this rank's rows of it"
)


# --- the check --------------------------------------------------------------------------------------------

_QUANTITIES = ("value", "down", "up", "x", "norm")  # the value, and the gradients in the order of backward


def _case(ranks: int) -> list[Tensor]:
    """x, norm, up and down of one device."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, inner = SIZES[ranks]
    shapes = ((tokens, width), (width,), (inner, width), (width, inner))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _parts(whole: Sequence[Tensor], rank: int, ranks: int) -> list[Tensor]:
    """What a rank has of x, norm, up and down, or of their gradients."""
    x, norm, up, down = whole
    return [x.chunk(ranks)[rank], norm, up.chunk(ranks)[rank], down.chunk(ranks, 1)[rank]]


def _one_device(rank: int, ranks: int) -> list[Tensor]:
    """A rank's part of each quantity, from one device."""
    x, norm, up, down = leaves = [t.requires_grad_() for t in _case(ranks)]
    y = F.silu(F.rms_norm(x, norm.shape, norm) @ up.T) @ down.T
    gradients = _parts(torch.autograd.grad((y**2).sum(), leaves), rank, ranks)
    return [y.detach().chunk(ranks)[rank], *(gradients[at] for at in (3, 2, 0, 1))]


def _values(answers: list[Answer], axis: Axis) -> list[tuple[list[Any], float]]:
    """For each answer its quantities, and the bytes that a ring carries for it."""
    out = []
    for answer in answers:
        x, norm, up, down = leaves = [
            t.clone().requires_grad_() for t in _parts(_case(axis.size), axis.index, axis.size)
        ]
        with ledger.recording() as sent:
            y = answer(*leaves, axis)
            if isinstance(y, Tensor) and y.requires_grad:
                (y**2).sum().backward()
        wire = sum(wire_bytes(operation, payload, axis.size) for (_, operation), payload in sent.items())
        value = y.detach() if isinstance(y, Tensor) else y
        out.append(([value, down.grad, up.grad, x.grad, norm.grad], wire))
    return out


def _run(answer: Answer) -> str | None:
    try:
        got = [rank[0] for rank in on_ranks(_values, [answer])]
    except RankError as error:
        if "returned an invalid gradient" in str(error):
            return _SHAPE
        raise
    want = [_one_device(rank, RANKS) for rank in range(RANKS)]
    for at, name in enumerate(_QUANTITIES):
        mine, true = [quantities[at] for quantities, _ in got], [quantities[at] for quantities in want]
        rank = next((rank for rank in range(RANKS) if not near(mine[rank], true[rank])), None)
        if rank is None:
            continue
        if name == "norm" and None not in mine and near(sum(mine), true[rank]) and not near(mine[0], mine[1]):
            return _PART
        return _known(got, at) or _told(name, rank, mine[rank], true[rank])
    x, norm, _, _ = _case(RANKS)
    budget = sum(wire_bytes("all_reduce", size * x.element_size(), RANKS) for size in (2 * x.numel(), norm.numel()))
    return _SENDS if any(wire > budget for _, wire in got) else _with_another_size(answer)


def _with_another_size(answer: Answer) -> str | None:
    """Whether it is right on three ranks as well, of an answer that is right on two."""
    try:
        got = [rank[0][0] for rank in on_ranks(_values, [answer], ranks=3)]
    except RankError as error:
        return f"right on {RANKS} ranks, and on 3 it fails: {str(error).splitlines()[-1]}"
    for rank, mine in enumerate(got):
        for name, one, true in zip(_QUANTITIES, mine, _one_device(rank, 3), strict=True):
            if not near(one, true):
                return f"right on {RANKS} ranks, and with 3 ranks and other sizes: {_told(name, rank, one, true)}"
    return None


def _known(got: list[tuple[list[Any], float]], at: int) -> str | None:
    """The hint of the mistake that has the same quantities up to the first wrong one; what follows may differ."""
    known = on_ranks(_values, [mistake for mistake, _ in _WRONG.values()])
    for number, (_, hint) in enumerate(_WRONG.values()):
        pairs = [(mine[: at + 1], rank[number][0][: at + 1]) for (mine, _), rank in zip(got, known, strict=True)]
        if all(_alike(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)):
            return hint
    return None


def _alike(got: Any, known: Any) -> bool:
    return near(got, known) if isinstance(known, Tensor) else got is known


def _told(name: str, rank: int, got: Any, want: Tensor) -> str:
    """What to say of a mistake that nobody planted."""
    if name == "value":
        if not isinstance(got, Tensor) or got.shape != want.shape:
            what = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            return f"with x of {list(want.shape)} on a rank its rows of the result are {list(want.shape)}, not {what}"
        return f"on rank {rank} the value is not that of one device"
    if got is None:
        return f"the value is right, and on rank {rank} no gradient comes back to {name}"
    return f"the value is right, and on rank {rank} the gradient of {name} is not{by_factor(got, want)}"


EXERCISES = [
    Exercise(
        id="04.mlp_on_rows",
        title="An MLP on a rank's own tokens",
        task="With sequence parallelism each rank has its rows of the tokens. Write the entry by hand, and return this "
        "rank's rows of norm and MLP, with the gradients of one device, that of the norm's weight included.",
        stub=mlp_on_rows_stub,
        reference=mlp_on_rows,
        mistakes=(
            *(Mistake(name, wrong, hint) for name, (wrong, hint) in _WRONG.items()),
            Mistake("the whole gradient", _variant(enter=_entry(all_reduce)), _SHAPE),
            Mistake("norm not summed", _variant(whole=_as_it_is), _PART),
            Mistake("norm's weight behind the entry, not summed", _weight_behind_entry, _PART),
            Mistake("all_reduce of the gradient, then own rows", _variant(enter=_entry(_own_of_sum)), _SENDS),
            Mistake("norm on all rows", _norm_on_all_rows, _SENDS),
        ),
        run=_run,
    ),
]
