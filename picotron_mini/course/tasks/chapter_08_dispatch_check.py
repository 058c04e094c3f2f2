"""How chapter 08 judges a dispatch: tools that look at what they are asked, and what is read from a wrong output.

The tools say what is wrong before any rank waits for another. Of a wrong output is asked whether it is a known one;
then whose rows the experts were given, and which of them was asked; then how much of each expert is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...collectives import all_to_all_async, ledger
from ...config import MeshShape, MoEConfig
from ...mesh import Axis, Mesh
from ...model.moe import Experts, local_dispatch
from ...parallel.expert_traffic import rows_for
from ..instruments.mixed import fault
from .chapter_08_dispatch import RANKS, Answer, Trade, all_near, exchange, judge_rounding, on_ranks

Given = tuple[Tensor, Tensor, Tensor]  # rows [R, D], local [R, K], weights [R, K]

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


EACH_CHOICE = (
    "right, and over the budget: a token was sent once for each of its experts; two experts on one rank need one row, "
    "since the receiver weighs and adds"
)
TO_EVERYONE = "right, and over the budget: every rank was sent every token; send it to the ranks that hold its experts"
LAST_RANK = "what a token's ranks send back replaces each other, and the last one stays; it is added up"
ROUND_ROBIN = "experts lie in runs: expert e is on rank e // held, and not on rank e % ranks"
COUNT = (
    "trade was given another number of rows than the sum of `sends`: on the way back the lists change places, and the "
    "rows must be in the order of the ranks"
)
RECEIVES = (
    "trade waits for other numbers of rows than come: on the way there only `tell` knows them, since no rank gets as "
    "many as it sends, and on the way back they are the numbers that were sent"
)
EACH_RANK = "`sends` and `receives` have a number for each rank of the axis, this one included"
GLOBAL = (
    "run was given an expert that is not here: on its rank expert e is number e % held, and -1 is none of this rank's"
)
WIDE = "run takes rows [R, D] with `local` and `weights` [R, K]: what belongs to a row travels in the same order as it"
ASTRAY = (
    "a token's output is no sum of what its own experts made: rows come back in the order in which they were sent, and "
    "if they were sorted by rank for that, the way back to the tokens is the inverse of the order"
)
UNMARKED = (
    "a token got something from an expert that it did not choose: where a choice lies on another rank, `local` is -1, "
    "or this rank's expert of the same number answers"
)
RANK_ORDER = (
    "as many rows went to each rank as should, and not those that belong there: rows must be in rank order before "
    "trade, first all for rank 0, and `local` and weights in the same order"
)
LOCAL_ORDER = (
    "rows reached the ranks of their experts with the `local` of other rows: it must travel in the order of its rows, "
    "so what sorts or picks these sorts and picks `local` too"
)
UNASKED = (
    "a token got something from an expert that it did not choose: either it went to a rank that holds none of its "
    "experts, or its row of `local` is another's, or is not -1 where a choice lies on another rank"
)
OWN_TWICE = (
    "what this rank's own experts make of its tokens is added twice: trade brings rows to the rank itself too, so "
    "nothing is left to add beside it"
)
RESIDUAL = "this is x plus the right output: the residual stream is added around a mixture; return what experts make"
DTYPE = "return the dtype of x: zeros and empty rows are float32 unless told otherwise, and round what is put into them"
MISSING = "a token lacks what one of its experts makes: it goes to each rank that holds one, also to the one it is on"
WEIGHTS = (
    "each token got its own experts, with other weights than its own: they travel with its row, run weighs and adds, "
    "and what comes back is only added up"
)
ORIGINS = (
    "right, and over the budget: to a rank travel a token's row, K numbers and K weights, and one row comes back; "
    "where that is from need not travel, since rows come back in the order in which they left"
)


def make_experts(part: slice) -> Experts:
    """A part of the experts, the same on every rank."""
    run = Experts(MoEConfig(num_experts=HELD * RANKS, top_k=K, expert_size=3), WIDTH).double()
    generator = torch.Generator().manual_seed(0)
    for name, weight in list(run.named_parameters()):
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        setattr(run, name, torch.nn.Parameter(drawn[part].clone()))
    return run


def tokens_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's tokens [N, D], their experts [N, K] and weights [N, K]."""
    generator = torch.Generator().manual_seed(rank + 1)
    wish = torch.rand(TOKENS[rank], HELD * RANKS, generator=generator, dtype=torch.float64)
    best = (wish + torch.tensor([0.6, 0.5, 0, 0, 0, 0])).topk(K)
    return torch.randn(TOKENS[rank], WIDTH, generator=generator, dtype=torch.float64), best.indices, best.values


@torch.no_grad()
def _dispatch_on_rank(answer: Answer) -> tuple[Any, int, list[Given]]:
    """What the answer returns, the bytes that it sent, and what it asked of this rank's experts."""
    axis = Mesh.build(MeshShape(dp=RANKS))["dp"]
    run = make_experts(slice(axis.index * HELD, (axis.index + 1) * HELD))

    def tell(sends: Sequence[int], axis: Axis) -> list[int]:
        if len(sends) != axis.size:
            raise ValueError(EACH_RANK)
        mine, theirs = torch.tensor(list(sends)), torch.empty(axis.size, dtype=torch.int64)
        all_to_all_async(theirs, mine, axis, [1] * axis.size, [1] * axis.size, "counts").wait()
        return [int(n) for n in theirs]

    def trade(x: Tensor, axis: Axis, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        if len(x) != sum(sends):
            raise ValueError(COUNT)
        if len(receives) != axis.size or tell(sends, axis) != list(receives):
            raise ValueError(RECEIVES)
        return exchange(x, axis, sends, receives)

    def on_experts(rows: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        if local.dim() != 2 or local.shape != weights.shape or len(local) != len(rows):
            raise ValueError(WIDE)
        if (local >= HELD).any():
            raise ValueError(GLOBAL)
        given.append((rows.clone(), local.clone(), weights.clone()))
        return local_dispatch(rows, local, weights, run)

    given: list[Given] = []
    tools = Tools(tell, trade, on_experts)
    with ledger.recording() as sent:
        out = answer(*tokens_of(axis.index), axis, HELD, tools)
    return out, sent["dp", "all_to_all"], given


def judge_dispatch(answer: Answer) -> str | None:
    """None for a right answer within the budget, else a hint."""
    results = on_ranks(_dispatch_on_rank, answer, (COUNT, RECEIVES, EACH_RANK, GLOBAL, WIDE))
    if isinstance(results, str):
        return results
    outputs = [out for out, *_ in results]
    whole = make_experts(slice(None))
    known = [_known_outputs(rank, whole) for rank in range(RANKS)]
    want = [each.pop("") for each in known]
    if not all(isinstance(got, Tensor) and got.shape == right.shape for got, right in zip(outputs, want, strict=True)):
        return "return a row for each token of this rank, a tensor [N, D]"
    if all_near(outputs, want):
        return judge_rounding(outputs, want) or _over_budget([sent for _, sent, _ in results])
    for hint in known[0]:
        if all_near(outputs, [each[hint] for each in known]):
            return hint
    if any(got.dtype != right.dtype for got, right in zip(outputs, want, strict=True)):
        return DTYPE
    return _read_given([given for *_, given in results]) or _read_output(outputs, whole)


@torch.no_grad()
def _known_outputs(rank: int, whole: Experts) -> dict[str, Tensor]:
    """By its hint what an answer makes that is known to be wrong, and what is right, without one."""
    x, experts, weights = tokens_of(rank)
    want = local_dispatch(x, experts, weights, whole)
    last = torch.zeros_like(x)
    parts = []
    for holder in range(RANKS):
        there = experts // HELD == holder
        parts.append(local_dispatch(x, experts.masked_fill(~there, -1), weights, whole))
        last[there.any(1)] = parts[-1][there.any(1)]
    dealt = experts % RANKS * HELD + experts // RANKS
    return {
        "": want,
        LAST_RANK: last,
        ROUND_ROBIN: local_dispatch(x, dealt, weights, whole),
        RESIDUAL: want + x,
        OWN_TWICE: want + parts[rank],
    }


def _read_given(given: list[list[Given]]) -> str | None:
    """What is wrong with what each rank's experts were asked, if it is a matter of order: whose each row is shows."""
    x, experts, _ = (torch.cat(parts) for parts in zip(*(tokens_of(rank) for rank in range(RANKS)), strict=True))
    whose, rank, asked = [], [], []
    for here, calls in enumerate(given):
        for rows, local, _ in calls:
            same = (rows[:, None] == x).all(-1)  # [R, all tokens]
            if not same.any(1).all():
                return None  # a row that is no token's
            whose.append(same.int().argmax(1))
            rank.append(torch.full((len(rows),), here))
            asked.append(local)
    if not whose:
        return None
    token, holder = torch.cat(whose), torch.cat(rank)
    there = experts[token] // HELD == holder[:, None]  # [R, K]
    if not there.any(1).all():
        return RANK_ORDER if _right_numbers(token, holder, experts) else None
    local = torch.cat(asked)
    if local.shape != there.shape:
        return None
    if torch.equal(local, experts[token] % HELD):
        return UNMARKED
    right = torch.where(there, experts[token] % HELD, -1)
    return LOCAL_ORDER if sorted(local.tolist()) == sorted(right.tolist()) and not torch.equal(local, right) else None


def _right_numbers(token: Tensor, holder: Tensor, experts: Tensor) -> bool:
    """Whether every token and every rank is there as often as it should be, with a row a rank or a row a choice."""
    choices = F.one_hot(experts // HELD, RANKS).sum(1)  # [all tokens, ranks]
    found = torch.bincount(token, minlength=len(experts)), torch.bincount(holder, minlength=RANKS)
    return any(
        torch.equal(found[0], rows.sum(1)) and torch.equal(found[1], rows.sum(0))
        for rows in (choices.clamp(max=1), choices)
    )


@torch.no_grad()
def _read_output(outputs: list[Tensor], whole: Experts) -> str:
    """What is wrong with outputs that are none of the known ones: the gravest of all ranks' faults."""
    faults = set()
    for rank, got in enumerate(outputs):
        x, experts, weights = tokens_of(rank)
        one = torch.ones(len(x), 1, dtype=x.dtype)
        each = [local_dispatch(x, torch.full((len(x), 1), e), one, whole) for e in range(HELD * RANKS)]
        wanted = torch.zeros(len(x), HELD * RANKS, dtype=x.dtype).scatter(1, experts, weights)
        faults.add(fault(got.double(), torch.stack(each, 1), wanted))
    hints = {"astray": ASTRAY, "unasked": UNASKED, "missing": MISSING}
    return next((hint for name, hint in hints.items() if name in faults), WEIGHTS)


def _over_budget(sent: list[int]) -> str | None:
    """Which rows were too many, if there were any: the ledger's bytes of each rank say it."""
    choices = [tokens_of(rank)[1] for rank in range(RANKS)]
    rows = [rows_for(each.tolist(), RANKS, HELD) for each in choices]
    row, beside = WIDTH * 8, WIDTH * 8 + 2 * K * 8
    for rank, number in enumerate(sent):
        here = sum(int((each // HELD == rank).sum()) for each in choices)
        if number > sum(rows[rank]) * beside + sum(each[rank] for each in rows) * row:
            return {
                RANKS * TOKENS[rank] * beside + sum(TOKENS) * row: TO_EVERYONE,
                K * TOKENS[rank] * beside + here * row: EACH_CHOICE,
                K * TOKENS[rank] * (row + 2 * 8) + here * row: EACH_CHOICE,
            }.get(number, ORIGINS)
    return None
