"""Exercise of chapter 08, tokens on their way to experts on other ranks: a dispatch with a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...mesh import Axis
from ..exercises import Exercise, Mistake, NotAttempted
from .chapter_08_dispatch import ROUNDED
from .chapter_08_dispatch_check import (
    ASTRAY,
    COUNT,
    DTYPE,
    EACH_CHOICE,
    EACH_RANK,
    GLOBAL,
    LAST_RANK,
    LOCAL_ORDER,
    MISSING,
    ORIGINS,
    OWN_TWICE,
    RANK_ORDER,
    RECEIVES,
    RESIDUAL,
    ROUND_ROBIN,
    TO_EVERYONE,
    UNASKED,
    UNMARKED,
    WEIGHTS,
    WIDE,
    Tools,
    judge_dispatch,
)

# --- 5: dispatch with a budget ----------------------------------------------------------------------------


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
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    axis: Axis,
    held: int,
    tools: Tools,
    back: str = "unsorted",
    left: Sequence[str] = (),
) -> Tensor:
    """Pairs of a token and a rank, listed by token and sorted by rank; with the order undone it is right."""
    goes = torch.stack([(experts // held == rank).any(1) for rank in range(axis.size)], 1)  # [N, ranks]
    token, rank = goes.nonzero(as_tuple=True)
    order = rank.argsort(stable=True)
    sends = torch.bincount(rank, minlength=axis.size).tolist()
    receives = tools.tell(sends, axis)
    local = torch.where(experts[token] // held == rank[:, None], experts[token] % held, -1)
    parts = {"rows": x[token], "local": local, "weights": weights[token]}
    came = [tools.trade(p if name in left else p[order], axis, sends, receives) for name, p in parts.items()]
    out = tools.trade(tools.run(*came), axis, receives, sends)
    out = out[order.argsort()] if back == "inverse" else out[order] if back == "sorted again" else out
    return torch.zeros_like(x).index_add(0, token, out)


def _dispatch_never_sorted(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    return _dispatch_by_sorting(x, experts, weights, axis, held, tools, left=("rows", "local", "weights"))


def _dispatch_local_not_sorted(
    x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools
) -> Tensor:
    return _dispatch_by_sorting(x, experts, weights, axis, held, tools, back="inverse", left=("local",))


def _dispatch_local_turned_round(
    x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools
) -> Tensor:
    def run(rows: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        return tools.run(rows, local.flip(0), weights)

    return dispatch(x, experts, weights, axis, held, Tools(tools.tell, tools.trade, run))


def _dispatch_choices_never_sorted(
    x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools
) -> Tensor:
    token = torch.arange(len(x)).repeat_interleave(experts.shape[1])
    sends = torch.bincount((experts // held).flatten(), minlength=axis.size).tolist()
    receives = tools.tell(sends, axis)
    parts = (x[token], (experts % held).flatten()[:, None], weights.flatten()[:, None])
    came = [tools.trade(part, axis, sends, receives) for part in parts]
    return torch.zeros_like(x).index_add(0, token, tools.trade(tools.run(*came), axis, receives, sends))


def _dispatch_all_of_a_rank(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    def run(rows: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        return tools.run(rows, torch.arange(local.shape[1]).clamp(max=held - 1).expand_as(local), weights)

    return dispatch(x, experts, weights, axis, held, Tools(tools.tell, tools.trade, run))


def _dispatch_own_twice(x: Tensor, experts: Tensor, weights: Tensor, axis: Axis, held: int, tools: Tools) -> Tensor:
    there = experts // held == axis.index
    own = tools.run(x, torch.where(there, experts % held, -1), weights)
    return own + dispatch(x, experts, weights, axis, held, tools)


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


EXERCISES = [
    Exercise(
        id="08.dispatch",
        title="Dispatch with a budget",
        task="Take tokens to the ranks of their experts and back, each once to each rank that holds one of them.",
        stub=dispatch_stub,
        reference=dispatch,
        mistakes=(
            Mistake("a row a choice", _dispatch_each_choice, EACH_CHOICE),
            Mistake("a thin row a choice", _dispatch_thin_rows, EACH_CHOICE),
            Mistake("to everyone", _dispatch_to_everyone, TO_EVERYONE),
            Mistake("overwritten", _dispatch_overwritten, LAST_RANK),
            Mistake("round robin", _dispatch_round_robin, ROUND_ROBIN),
            Mistake("not swapped", _dispatch_not_swapped, COUNT),
            Mistake("half swapped", _dispatch_half_swapped, RECEIVES),
            Mistake("not told", _dispatch_untold, RECEIVES),
            Mistake("one number", _dispatch_one_number, EACH_RANK),
            Mistake("flat", _dispatch_flat, WIDE),
            Mistake("numbers of the whole model", _dispatch_whole_numbers, GLOBAL),
            Mistake("others not marked", _dispatch_unmarked, UNMARKED),
            Mistake("never sorted", _dispatch_never_sorted, RANK_ORDER),
            Mistake("choices never sorted", _dispatch_choices_never_sorted, RANK_ORDER),
            Mistake("local not sorted", _dispatch_local_not_sorted, LOCAL_ORDER),
            Mistake("local turned round", _dispatch_local_turned_round, LOCAL_ORDER),
            Mistake("all experts of a rank", _dispatch_all_of_a_rank, UNASKED),
            Mistake("own experts twice", _dispatch_own_twice, OWN_TWICE),
            Mistake("residual", lambda x, *rest: x + dispatch(x, *rest), RESIDUAL),
            Mistake("in float32", lambda *asked: dispatch(*asked).float(), ROUNDED),
            Mistake("averaged in float32", lambda *asked: _dispatch_averaged(*asked).float(), DTYPE),
            Mistake("left sorted", _dispatch_by_sorting, ASTRAY),
            Mistake("sorted again", _dispatch_sorted_again, ASTRAY),
            Mistake("not to itself", _dispatch_not_to_itself, MISSING),
            Mistake("averaged", _dispatch_averaged, WEIGHTS),
            Mistake("weights of others", _dispatch_other_weights, WEIGHTS),
            Mistake("origins travel too", _dispatch_with_origins, ORIGINS),
        ),
        run=judge_dispatch,
    ),
]
