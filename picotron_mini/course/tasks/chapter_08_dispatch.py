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


def near(got: Any, want: Tensor) -> bool:
    """Whether an answer is the right tensor but for rounding."""
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def on_ranks(fn: Callable[..., Any], answer: Answer, hints: Sequence[str]) -> list[Any] | str:
    """What the ranks return, or the hint that one of them has raised."""
    try:
        return launch(fn, answer, world_size=RANKS, timeout=60, output="hide")
    except RankError as error:
        said = next((hint for hint in hints if hint in str(error)), None)
        if said is None:
            raise
        return said


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
_SCALED = "the gradient of a row was divided or multiplied: a row has one origin, so nothing is summed or averaged"


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
        return exchange(x, axis, to, of)

    return answer(came.clone(), axis, sends, receives, checked), exchange(came, axis, receives, sends)


def _run_way_back(answer: Answer) -> str | None:
    results = on_ranks(_way_back_on_rank, answer, (_NOT_SWAPPED, _HALF))
    if isinstance(results, str):
        return results
    if all(near(got, want) for got, want in results):
        return None
    if any(isinstance(got, Tensor) and got.shape != want.shape for got, want in results):
        return _STAYED
    if all(isinstance(got, Tensor) and near(got * (want.sum() / got.sum()), want) for got, want in results):
        return _SCALED
    return "the gradients of some rows are wrong"


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
        ),
        run=_run_way_back,
    ),
]
