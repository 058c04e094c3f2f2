"""Exercise of chapter 08, tokens on their way to experts on other ranks: a dispatch with a budget.

The tools that a learner is given look at what they are asked before any rank waits for another. What is wrong with an
output is read from how much of each expert is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...collectives import all_to_all_async, ledger
from ...config import MeshShape, MoEConfig
from ...launch import launch
from ...mesh import Axis, Mesh
from ...model.moe import Experts, local_dispatch
from ...parallel.expert_traffic import rows_for
from ..exercises import Exercise, Mistake, NotAttempted
from ..instruments.mixed import fault
from .chapter_08_dispatch import RANKS, Answer, Trade, exchange, near, on_ranks

# --- 5: dispatch with a budget ----------------------------------------------------------------------------

HELD, K, TOKENS = 2, 3, (5, 2, 7)
WIDTH = 8  # of a row: more than there are experts, so that an output shows how much of each is in it


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


def _dispatch_thin_rows(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    order = (experts // held).flatten().argsort(stable=True)
    token = order // experts.shape[1]
    sends = torch.bincount((experts // held).flatten(), minlength=axis.size).tolist()
    receives = tools.tell(sends, axis)
    beside = (each.flatten()[order][:, None] for each in (experts % held, weights))
    came = [tools.trade(part, axis, sends, receives) for part in (x[token], *beside)]
    return torch.zeros_like(x).index_add(0, token, tools.trade(tools.run(*came), axis, receives, sends))


def _dispatch_flat(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    def run(rows: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        return tools.run(rows, local.flatten(), weights.flatten())

    return dispatch(x, experts, weights, axis, held, Tools(tools.tell, tools.trade, run))


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


def _dispatch_by_sorting(
    x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools, back: str = "unsorted"
) -> Tensor:
    """Pairs of a token and a rank, listed by token and sorted by rank; with the order undone it is right."""
    goes = torch.stack([(experts // held == rank).any(1) for rank in range(axis.size)], 1)  # [N, ranks]
    token, rank = goes.nonzero(as_tuple=True)
    order = rank.argsort(stable=True)
    sends = torch.bincount(rank, minlength=axis.size).tolist()
    receives = tools.tell(sends, axis)
    local = torch.where(experts[token] // held == rank[:, None], experts[token] % held, -1)
    came = [tools.trade(part[order], axis, sends, receives) for part in (x[token], local, weights[token])]
    out = tools.trade(tools.run(*came), axis, receives, sends)
    out = out[order.argsort()] if back == "inverse" else out[order] if back == "sorted again" else out
    return torch.zeros_like(x).index_add(0, token, out)


def _dispatch_sorted_again(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    return _dispatch_by_sorting(x, experts, weights, axis, held, tools, back="sorted again")


def _dispatch_unmarked(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    token = [(experts // held == rank).any(1).nonzero().flatten() for rank in range(axis.size)]
    return _there_and_back(x, token, [(experts % held)[goes] for goes in token], weights, axis, tools)


def _dispatch_whole_numbers(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    token, numbers = [], []
    for rank in range(axis.size):
        there = experts // held == rank
        token.append(there.any(1).nonzero().flatten())
        numbers.append(torch.where(there, experts, -1)[token[-1]])
    return _there_and_back(x, token, numbers, weights, axis, tools)


def _dispatch_not_to_itself(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    others = experts.masked_fill(experts // held == axis.index, -held * axis.size)
    return dispatch(x, others, weights, axis, held, tools)


def _dispatch_averaged(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    ranks = torch.stack([(experts // held == rank).any(1) for rank in range(axis.size)]).sum(0)
    return dispatch(x, experts, weights, axis, held, tools) / ranks[:, None]


def _dispatch_other_weights(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    return dispatch(x, experts, weights.roll(1, 0), axis, held, tools)


def _dispatch_untold(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    return dispatch(x, experts, weights, axis, held, Tools(lambda sends, axis: list(sends), tools.trade, tools.run))


def _dispatch_half_swapped(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    def trade(x: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        came.append(receives)
        return tools.trade(x, axis, sends, receives if len(came) < 4 else sends)

    came: list[Sequence[int]] = []
    return dispatch(x, experts, weights, axis, held, Tools(tools.tell, trade, tools.run))


def _dispatch_one_number(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    receives = tools.tell([len(x)], axis)
    return tools.trade(x, axis, [len(x)], receives)


def _dispatch_with_origins(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    def trade(rows: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        if rows.dtype == torch.int64:
            tools.trade(torch.arange(len(rows)), axis, sends, receives)
        return tools.trade(rows, axis, sends, receives)

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
_RECEIVES = (
    "trade waits for other numbers of rows than come: on the way there only `tell` knows them, since no rank gets as "
    "many as it sends, and on the way back they are the numbers that were sent"
)
_EACH_RANK = "`sends` and `receives` have a number for each rank of the axis, this one included"
_GLOBAL = (
    "run was given an expert that is not here: on its rank expert e is number e % held, and -1 is none of this rank's"
)
_WIDE = "run takes rows [R, D] with `local` and `weights` [R, K]: what belongs to a row travels in the same order as it"
_ASTRAY = (
    "a token's output is no sum of what its own experts made: rows come back in the order in which they were sent, and "
    "if they were sorted by rank for that, the way back to the tokens is the inverse of the order"
)
_UNASKED = (
    "a token got something from an expert that it did not choose: where a choice lies on another rank, `local` is -1, "
    "or this rank's expert of the same number answers"
)
_MISSING = "a token lacks what one of its experts makes: it goes to each rank that holds one, also to the one it is on"
_WEIGHTS = (
    "each token got its own experts, with other weights than its own: they travel with its row, run weighs and adds, "
    "and what comes back is only added up"
)
_ORIGINS = (
    "right, and over the budget: to a rank travel a token's row, K numbers and K weights, and one row comes back; "
    "where that is from need not travel, since rows come back in the order in which they left"
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
        if len(sends) != axis.size:
            raise ValueError(_EACH_RANK)
        mine, theirs = torch.tensor(list(sends)), torch.empty(axis.size, dtype=torch.int64)
        all_to_all_async(theirs, mine, axis, [1] * axis.size, [1] * axis.size, "counts").wait()
        return [int(n) for n in theirs]

    def trade(x: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        if len(x) != sum(sends):
            raise ValueError(_COUNT)
        if len(receives) != axis.size or tell(sends, axis) != list(receives):
            raise ValueError(_RECEIVES)
        return exchange(x, axis, sends, receives)

    def on_experts(rows: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        if local.dim() != 2 or local.shape != weights.shape or len(local) != len(rows):
            raise ValueError(_WIDE)
        if (local >= HELD).any():
            raise ValueError(_GLOBAL)
        return local_dispatch(rows, local, weights, run)

    tools = Tools(tell, trade, on_experts)
    with ledger.recording() as sent:
        out = answer(*_tokens_of(axis.index), axis, HELD, tools)
    return out, sent["dp", "all_to_all"]


def _run_dispatch(answer: Answer) -> str | None:
    results = on_ranks(_dispatch_on_rank, answer, (_COUNT, _RECEIVES, _EACH_RANK, _GLOBAL, _WIDE))
    if isinstance(results, str):
        return results
    whole = _make_experts(slice(None))
    with torch.no_grad():
        want = [local_dispatch(*_tokens_of(rank), whole) for rank in range(RANKS)]
    if not all(
        isinstance(got, Tensor) and got.shape == right.shape for (got, _), right in zip(results, want, strict=True)
    ):
        return "return a row for each token of this rank, a tensor [N, D]"
    if not all(near(got, right) for (got, _), right in zip(results, want, strict=True)):
        for wrong, hint in ((_dispatch_overwritten, _LAST_RANK), (_dispatch_round_robin, _ROUND_ROBIN)):
            theirs = launch(_dispatch_on_rank, wrong, world_size=RANKS, timeout=60, output="hide")
            if all(near(got, out) for (got, _), (out, _) in zip(results, theirs, strict=True)):
                return hint
        return _read_output([got for got, _ in results], whole)
    return _over_budget([sent for _, sent in results])


@torch.no_grad()
def _read_output(outputs: list[Tensor], whole: Experts) -> str:
    """What is wrong with outputs that are none of the known ones: the gravest of all ranks' faults."""
    faults = set()
    for rank, got in enumerate(outputs):
        x, experts, weights = _tokens_of(rank)
        one = torch.ones(len(x), 1, dtype=x.dtype)
        each = [local_dispatch(x, torch.full((len(x), 1), e), one, whole) for e in range(HELD * RANKS)]
        wanted = torch.zeros(len(x), HELD * RANKS, dtype=x.dtype).scatter(1, experts, weights)
        faults.add(fault(got.double(), torch.stack(each, 1), wanted))
    hints = {"astray": _ASTRAY, "unasked": _UNASKED, "missing": _MISSING}
    return next((hint for name, hint in hints.items() if name in faults), _WEIGHTS)


def _over_budget(sent: list[int]) -> str | None:
    """Which rows were too many, if there were any: the ledger's bytes of each rank say it."""
    choices = [_tokens_of(rank)[1] for rank in range(RANKS)]
    rows = [rows_for(each.tolist(), RANKS, HELD) for each in choices]
    row, beside = WIDTH * 8, WIDTH * 8 + 2 * K * 8
    for rank, number in enumerate(sent):
        here = sum(int((each // HELD == rank).sum()) for each in choices)
        if number > sum(rows[rank]) * beside + sum(each[rank] for each in rows) * row:
            return {
                RANKS * TOKENS[rank] * beside + sum(TOKENS) * row: _TO_EVERYONE,
                K * TOKENS[rank] * beside + here * row: _EACH_CHOICE,
                K * TOKENS[rank] * (row + 2 * 8) + here * row: _EACH_CHOICE,
            }.get(number, _ORIGINS)
    return None


EXERCISES = [
    Exercise(
        id="08.dispatch",
        title="Dispatch with a budget",
        task="Take tokens to the ranks of their experts and back, each once to each rank that holds one of them.",
        stub=dispatch_stub,
        reference=dispatch,
        mistakes=(
            Mistake("a row a choice", _dispatch_each_choice, _EACH_CHOICE),
            Mistake("a thin row a choice", _dispatch_thin_rows, _EACH_CHOICE),
            Mistake("to everyone", _dispatch_to_everyone, _TO_EVERYONE),
            Mistake("overwritten", _dispatch_overwritten, _LAST_RANK),
            Mistake("round robin", _dispatch_round_robin, _ROUND_ROBIN),
            Mistake("not swapped", _dispatch_not_swapped, _COUNT),
            Mistake("half swapped", _dispatch_half_swapped, _RECEIVES),
            Mistake("not told", _dispatch_untold, _RECEIVES),
            Mistake("one number", _dispatch_one_number, _EACH_RANK),
            Mistake("flat", _dispatch_flat, _WIDE),
            Mistake("numbers of the whole model", _dispatch_whole_numbers, _GLOBAL),
            Mistake("others not marked", _dispatch_unmarked, _UNASKED),
            Mistake("left sorted", _dispatch_by_sorting, _ASTRAY),
            Mistake("sorted again", _dispatch_sorted_again, _ASTRAY),
            Mistake("not to itself", _dispatch_not_to_itself, _MISSING),
            Mistake("averaged", _dispatch_averaged, _WEIGHTS),
            Mistake("weights of others", _dispatch_other_weights, _WEIGHTS),
            Mistake("origins travel too", _dispatch_with_origins, _ORIGINS),
        ),
        run=_run_dispatch,
    ),
]
