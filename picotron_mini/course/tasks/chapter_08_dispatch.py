"""Exercises of chapter 08, tokens on their way to experts on other ranks: the way back, and a dispatch with a budget.

Both run on three ranks that trade unequal numbers of rows. Wrong numbers would make ranks wait for each other or fail
somewhere inside a backend, so the exchange that a learner is given looks at them first and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...collectives import all_to_all_async, ledger
from ...config import MeshShape, MoEConfig
from ...launch import RankError, launch
from ...mesh import Axis, Mesh
from ...model.moe import Experts, local_dispatch
from ...parallel.expert_traffic import rows_for
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]
Trade = Callable[[Tensor, Axis, Sequence[int], Sequence[int]], Tensor]

RANKS = 3
ROWS = ((2, 1, 0), (3, 0, 2), (0, 1, 1))  # from a rank to a rank; no rank sends as many as it receives
WIDTH = 4


def _trade(x: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
    out = x.new_empty(sum(receives), *x.shape[1:])
    all_to_all_async(out, x.contiguous(), axis, list(receives), list(sends)).wait()
    return out


def _near(got: Any, want: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def _on_ranks(fn: Callable[..., Any], answer: Answer, hints: Sequence[str]) -> list[Any] | str:
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
        return _trade(x, axis, to, of)

    return answer(came.clone(), axis, sends, receives, checked), _trade(came, axis, receives, sends)


def _run_way_back(answer: Answer) -> str | None:
    results = _on_ranks(_way_back_on_rank, answer, (_NOT_SWAPPED, _HALF))
    if isinstance(results, str):
        return results
    if all(_near(got, want) for got, want in results):
        return None
    if any(isinstance(got, Tensor) and got.shape != want.shape for got, want in results):
        return _STAYED
    if all(isinstance(got, Tensor) and _near(got * (want.sum() / got.sum()), want) for got, want in results):
        return _SCALED
    return "the gradients of some rows are wrong"


# --- 5: dispatch with a budget ----------------------------------------------------------------------------

HELD, K, TOKENS = 2, 3, (5, 2, 7)


@dataclass(frozen=True)
class Tools:
    """What a learner's dispatch may use.

    Attributes:
        tell: `tell(sends, axis)`: each rank says how many rows it sends to each; returns how many come.
        trade: `trade(x, axis, sends, receives)`: the exchange.
        run: `run(rows, local, weights)`: this rank's experts on rows [R, D]; `local` [R, K] int64 says which of them
            (-1: none of this rank's), `weights` [R, K] with which weights. Returns the weighted sums [R, D].
    """

    tell: Callable[[Sequence[int], Axis], list[int]]
    trade: Trade
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


def dispatch_stub(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    """Take tokens to the ranks that hold their experts, and bring back what these make of them. Forward only.

    Args:
        x: [N, D].
        experts: [N, K] int64; expert e is number e % held on rank e // held.
        weights: [N, K].

    Returns:
        [N, D]. Budget: each token travels once to each rank that holds one of its experts, with K numbers of experts
        and K weights, and one row comes back.
    """
    raise NotAttempted


def dispatch(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    """Rows by rank, then by token; what comes back has the same order."""
    token, local = [], []
    for rank in range(axis.size):
        there = experts // held == rank  # [N, K]
        goes = there.any(1).nonzero().flatten()
        token.append(goes)
        local.append(torch.where(there, experts % held, -1)[goes])
    return _there_and_back(x, token, local, weights, axis, tools)


def _there_and_back(
    x: Tensor, token: list[Tensor], local: list[Tensor], weights: Tensor, axis: Axis, tools: Tools
) -> Tensor:
    sends, rows = [len(part) for part in token], torch.cat(token)
    receives = tools.tell(sends, axis)
    came = [tools.trade(part, axis, sends, receives) for part in (x[rows], torch.cat(local), weights[rows])]
    out = tools.trade(tools.run(*came), axis, receives, sends)
    return torch.zeros_like(x).index_add(0, rows, out)


def _dispatch_each_choice(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    token, local = [], []
    for rank in range(axis.size):
        goes, place = (experts // held == rank).nonzero(as_tuple=True)
        one = torch.full((len(goes), experts.shape[1]), -1)
        one[torch.arange(len(goes)), place] = experts[goes, place] % held
        token.append(goes)
        local.append(one)
    return _there_and_back(x, token, local, weights, axis, tools)


def _dispatch_to_everyone(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    everyone = [torch.arange(len(x))] * axis.size
    local = [torch.where(experts // held == rank, experts % held, -1) for rank in range(axis.size)]
    return _there_and_back(x, everyone, local, weights, axis, tools)


def _dispatch_overwritten(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    out = torch.zeros_like(x)
    parts = []
    for rank in range(axis.size):  # the right sum, of which the last rank's part is kept
        mine = experts.masked_fill(experts // held != rank, -held * axis.size)
        parts.append(dispatch(x, mine, weights, axis, held, tools))
        reached = (experts // held == rank).any(1)
        out[reached] = parts[-1][reached]
    return out


def _dispatch_round_robin(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    return dispatch(x, experts % axis.size * held + experts // axis.size, weights, axis, held, tools)


def _dispatch_not_swapped(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    lists: list[tuple[Sequence[int], Sequence[int]]] = []

    def trade(x: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        lists.append((sends, receives))
        return tools.trade(x, axis, *lists[0])

    return dispatch(x, experts, weights, axis, held, Tools(tools.tell, trade, tools.run))


_EACH_CHOICE = (
    "right, and over the budget: a token was sent once for each of its experts; two experts on one rank need one row, "
    "since the receiver weighs and adds"
)
_TO_EVERYONE = "right, and over the budget: every rank was sent every token; send it to the ranks that hold its experts"
_LAST_RANK = "what a token's ranks send back replaces each other, and the last one stays; it is added up"
_ROUND_ROBIN = "experts lie in runs: expert e is on rank e // held, and not on rank e % ranks"
_COUNT = (
    "trade was given another number of rows than the sum of `sends`: on the way back the lists change places, and the "
    "rows must be in the order of the ranks"
)


def _make_experts(part: slice) -> Experts:
    run = Experts(MoEConfig(num_experts=HELD * RANKS, top_k=K, expert_size=3), WIDTH).double()
    generator = torch.Generator().manual_seed(0)
    for name, weight in list(run.named_parameters()):
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        setattr(run, name, torch.nn.Parameter(drawn[part].clone()))
    return run


def _tokens_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank + 1)
    wish = torch.rand(TOKENS[rank], HELD * RANKS, generator=generator, dtype=torch.float64)
    best = (wish + torch.tensor([0.6, 0.5, 0, 0, 0, 0])).topk(K)
    return torch.randn(TOKENS[rank], WIDTH, generator=generator, dtype=torch.float64), best.indices, best.values


@torch.no_grad()
def _dispatch_on_rank(answer: Answer) -> tuple[Any, int]:
    axis = Mesh.build(MeshShape(dp=RANKS))["dp"]
    run = _make_experts(slice(axis.index * HELD, (axis.index + 1) * HELD))

    def tell(sends: Sequence[int], axis: Axis) -> list[int]:
        mine, theirs = torch.tensor(list(sends)), torch.empty(axis.size, dtype=torch.int64)
        all_to_all_async(theirs, mine, axis, [1] * axis.size, [1] * axis.size, "counts").wait()
        return [int(n) for n in theirs]

    def trade(x: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        if len(x) != sum(sends):
            raise ValueError(_COUNT)
        return _trade(x, axis, sends, receives)

    tools = Tools(tell, trade, lambda rows, local, weights: local_dispatch(rows, local, weights, run))
    with ledger.recording() as sent:
        out = answer(*_tokens_of(axis.index), axis, HELD, tools)
    return out, sent["dp", "all_to_all"]


def _run_dispatch(answer: Answer) -> str | None:
    results = _on_ranks(_dispatch_on_rank, answer, (_COUNT,))
    if isinstance(results, str):
        return results
    whole = _make_experts(slice(None))
    with torch.no_grad():
        want = [local_dispatch(*_tokens_of(rank), whole) for rank in range(RANKS)]
    if not all(_near(got, truth) for (got, _), truth in zip(results, want, strict=True)):
        for wrong, hint in ((_dispatch_overwritten, _LAST_RANK), (_dispatch_round_robin, _ROUND_ROBIN)):
            theirs = launch(_dispatch_on_rank, wrong, world_size=RANKS, timeout=60, output="hide")
            if all(_near(got, out) for (got, _), (out, _) in zip(results, theirs, strict=True)):
                return hint
        return "the output of some token is wrong"
    rows = [rows_for(_tokens_of(rank)[1].tolist(), RANKS, HELD) for rank in range(RANKS)]
    for rank, (_, sent) in enumerate(results):
        out, back = sum(rows[rank]), sum(row[rank] for row in rows)
        beside, everyone = WIDTH * 8 + 2 * K * 8, sum(TOKENS) * WIDTH * 8
        if sent > out * beside + back * WIDTH * 8:
            return _TO_EVERYONE if sent == RANKS * TOKENS[rank] * beside + everyone else _EACH_CHOICE
    return None


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
    Exercise(
        id="08.dispatch",
        title="Dispatch with a budget",
        task="Take tokens to the ranks of their experts and back, each once to each rank that holds one of them.",
        stub=dispatch_stub,
        reference=dispatch,
        mistakes=(
            Mistake("a row a choice", _dispatch_each_choice, _EACH_CHOICE),
            Mistake("to everyone", _dispatch_to_everyone, _TO_EVERYONE),
            Mistake("overwritten", _dispatch_overwritten, _LAST_RANK),
            Mistake("round robin", _dispatch_round_robin, _ROUND_ROBIN),
            Mistake("not swapped", _dispatch_not_swapped, _COUNT),
        ),
        run=_run_dispatch,
    ),
]
