"""Exercise of chapter 08, tokens on their way to experts on other ranks: the way back.

Three ranks trade unequal numbers of rows. Wrong numbers would make ranks wait for each other or fail somewhere inside a
backend, so the exchange that a learner is given looks at them first and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...collectives import all_to_all_async
from ...config import MeshShape
from ...launch import RankError, launch
from ...mesh import Axis, Mesh
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]
Trade = Callable[[Tensor, Axis, Sequence[int], Sequence[int]], Tensor]

RANKS = 3
ROWS = ((2, 1, 0), (3, 0, 2), (0, 1, 1))  # from a rank to a rank; no rank sends as many as it receives
WIDTH = 4


def exchange(x: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
    """Send `sends[j]` rows of x to each rank j; returns the rows that come, `receives[j]` from each."""
    out = x.new_empty(sum(receives), *x.shape[1:])
    all_to_all_async(out, x.contiguous(), axis, list(receives), list(sends)).wait()
    return out


def near(got: Any, want: Tensor, digits: int = 9) -> bool:
    """Whether an answer is the right tensor but for rounding, whatever its dtype."""
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return False
    return torch.allclose(got.double(), want, rtol=10**-digits, atol=10 ** -(digits + 3))


def all_near(got: Sequence[Any], want: Sequence[Tensor]) -> bool:
    """Whether all ranks' answers are right, in all digits or in float32's."""
    return all(near(*pair, digits=4) for pair in zip(got, want, strict=True))


def judge_rounding(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """A hint if answers that are `all_near` have lost digits, or room for them."""
    exact = all(near(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(got, want, strict=True))
    return None if exact else ROUNDED


def on_ranks(fn: Callable[..., Any], answer: Answer, hints: Sequence[str]) -> list[Any] | str:
    """What the ranks return, or the hint that one of them has raised."""
    try:
        return launch(fn, answer, world_size=RANKS, timeout=60, output="hide")
    except RankError as error:
        said = next((hint for hint in hints if hint in str(error)), None)
        if said is None:
            raise
        return said


ROUNDED = (
    "right but for rounding: keep the dtype of the rows, float64 here, in what is computed and in what is returned"
)

# --- 4: the way back --------------------------------------------------------------------------------------


def way_back_stub(gradient: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int], trade: Trade) -> Tensor:
    """The backward of an exchange in which this rank sent `sends[j]` rows to rank j and got `receives[j]` from it.

    Args:
        gradient: [sum(receives), D], of the rows that came.
        trade: `trade(x, axis, to, of)` sends `to[j]` rows of x to each rank j and returns the rows that come, `of[j]`
            from each.

    Returns:
        [sum(sends), D], the gradient of the rows that were sent.
    """
    raise NotAttempted


def way_back(gradient: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int], trade: Trade) -> Tensor:
    """Every row's gradient goes home: what was received is sent, and what was sent is received."""
    return trade(gradient, axis, receives, sends)


_NOT_SWAPPED = (
    "the gradient was sent with the numbers of the forward: this rank now holds receives[j] rows for rank j, and waits "
    "for sends[j]; the two lists change places"
)
_HALF = "only one of the two lists is right: to rank j go as many rows as came from it, and as many come as went to it"
_STAYED = "the gradient stayed where the rows went; each of its rows belongs to the rank that sent it"
_COUNT = "trade was given another number of rows than it should send: those that came, each once, as they came"
_SHAPE = "return a gradient for each row that was sent, a tensor [sum(sends), D]"
_LOST = "rows that were sent got no gradient: what `trade` returns is the gradient of all of them"
_ORDER = (
    "the right rows, in others' places: trade sends rows in the order of ranks and returns them so, which is the order "
    "in which they came and left; nothing is sorted or turned round on either side"
)
_MIXED = (
    "what came home is neither the rows' gradients nor a multiple or another order of them: each row passes as it is, "
    "and is not summed with others or with those that stayed, nor are its channels moved"
)
_SCALED = "the gradient of a row was divided or multiplied: a row has one origin, so nothing is summed or averaged"


def _way_back_of_more(
    gradient: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int], trade: Trade
) -> Tensor:
    return trade(torch.cat((gradient, gradient[:1])), axis, receives, sends)


def _way_back_on_rank(answer: Answer) -> tuple[Tensor, Tensor]:
    """What the answer returns, and what is right."""
    axis = Mesh.build(MeshShape(dp=RANKS))["dp"]
    sends, receives = list(ROWS[axis.index]), [row[axis.index] for row in ROWS]
    came = torch.arange(sum(receives) * WIDTH, dtype=torch.float64).view(-1, WIDTH) + 100 * axis.index

    def checked(x: Tensor, axis: Axis, to: Sequence[int], of: Sequence[int]) -> Tensor:
        to, of = list(to), list(of)
        if (to, of) == (sends, receives):
            raise ValueError(_NOT_SWAPPED)
        if (to, of) != (receives, sends):
            raise ValueError(_HALF)
        if len(x) != sum(to):
            raise ValueError(_COUNT)
        return exchange(x, axis, to, of)

    return answer(came.clone(), axis, sends, receives, checked), exchange(came, axis, receives, sends)


def _run_way_back(answer: Answer) -> str | None:
    results = on_ranks(_way_back_on_rank, answer, (_NOT_SWAPPED, _HALF, _COUNT))
    if isinstance(results, str):
        return results
    got, want = [got for got, _ in results], [want for _, want in results]
    if not all(isinstance(each, Tensor) for each in got):
        return _SHAPE
    if any(each.shape != right.shape for each, right in zip(got, want, strict=True)):
        came = [(sum(row[rank] for row in ROWS), WIDTH) for rank in range(RANKS)]
        return _STAYED if [each.shape for each in got] == came else _SHAPE
    return judge_rounding(got, want) if all_near(got, want) else _read_rows(torch.cat(got).double(), torch.cat(want))


def _read_rows(got: Tensor, want: Tensor) -> str:
    """What became of all ranks' rows [R, D]: no row here is a multiple of another."""
    factors = (got * want).sum(1, keepdim=True) / want.square().sum(1, keepdim=True)
    if near(got, factors * want):
        return _SCALED if factors.all() else _LOST
    return _ORDER if sorted(got.tolist()) == sorted(want.tolist()) else _MIXED


EXERCISES = [
    Exercise(
        id="08.way_back",
        title="The way back",
        task="Write the backward of an all_to_all with uneven splits.",
        stub=way_back_stub,
        reference=way_back,
        mistakes=(
            Mistake(
                "not swapped", lambda g, axis, sends, receives, trade: trade(g, axis, sends, receives), _NOT_SWAPPED
            ),
            Mistake("half swapped", lambda g, axis, sends, receives, trade: trade(g, axis, receives, receives), _HALF),
            Mistake("stayed", lambda g, axis, sends, receives, trade: g, _STAYED),
            Mistake(
                "averaged",
                lambda g, axis, sends, receives, trade: trade(g, axis, receives, sends) / axis.size,
                _SCALED,
            ),
            Mistake("in float32", lambda g, *rest: way_back(g, *rest).float(), ROUNDED),
            Mistake("turned round before", lambda g, *rest: way_back(g.flip(0), *rest), _ORDER),
            Mistake("turned round after", lambda g, *rest: way_back(g, *rest).flip(0), _ORDER),
            Mistake("zeros", lambda g, *rest: torch.zeros_like(way_back(g, *rest)), _LOST),
            Mistake("summed", lambda g, *rest: way_back(g, *rest).cumsum(0), _MIXED),
            Mistake("channels turned round", lambda g, *rest: way_back(g, *rest).flip(1), _MIXED),
            Mistake("flat", lambda g, *rest: way_back(g, *rest).flatten(), _SHAPE),
            Mistake("one row more", _way_back_of_more, _COUNT),
        ),
        run=_run_way_back,
    ),
]
