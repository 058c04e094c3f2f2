"""Dispatch: take each token to the ranks that hold its experts, and bring back what they make of it.

With E experts on `ep` ranks, E/ep on each, and K experts a token:

    rank 0   t0 -> experts 0, 1     t0 ------------> rank 0       both of its experts are there: one row, not two
             t1 -> experts 1, 2     t1 ------------> rank 0
                                    t1' -----------> rank 1       a row for each *rank* that holds one of its experts
    rank 1   t2 -> experts 0, 3     t2 ------------> rank 0 ...

    1 plan      from experts [N, K]: which rows go to which rank; the ranks tell each other how many (control traffic)
    2 start     all_to_all of rows [S, D] and, beside them, which experts they are for, with which weights [S, 2 K]
    3 meanwhile the shared expert, if there is one
    4 experts   of this rank, on the rows [R, D] that came; a row's outputs are weighed and added up *here*
    5 back      all_to_all of [R, D], one row for each that came
    6 add up    the rows [S, D] of a token's ranks -> y [N, D]

One row a rank instead of one an expert saves bytes both ways: of K choices that fall evenly on E experts, a token needs
ep (1 - C(E - E/ep, K) / C(E, K)) ranks; with E=8, K=2, ep=2 that is 1.57 rows and not 2.

Every step is differentiable, and the exchanges have their gradients (`exchange.py`), so the backward is autograd's: the
gradients of outputs go where the rows went, those of rows and weights come back.

If an expert has copies (`placement.py`), the token at place n of rank r goes to copy (n + r) mod c: every copy gets as
many, without a word between ranks, and a layer that is computed again sends its tokens where they went before. Which
copy it is changes no result.

`parts` cuts the tokens: while the experts compute one part, the next one's rows travel. As in `exchange.py`, backward
it is the same in reverse.

The only thing for which the host waits is the numbers of rows, which it must know to make room: once for each call.

Cost in payload, with S rows sent, R received, w bytes a number of x and g = max(w, 4) of a weight:
    forward    S (D w + 2 K g) there, R D w back;      backward    S D w there, R (D w + 2 K g) back
    control    16 ep parts forward, counted apart
With a narrower `payload` (`payload.py`) D w is less: bf16 2 D both ways, fp8 D + 4 there and at most 2 D back.

Papers: GShard (arXiv 2006.16668), Tutel (arXiv 2206.03382); once for each rank: DeepSeek-V3 (arXiv 2412.19437).
Legend: N tokens, D width, K experts a token, E experts, S rows sent, R rows received, M rows for experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..collectives import all_to_all_async
from ..mesh import Axis
from ..model.moe import Experts, local_dispatch
from ..model.permute import PLAIN, Passes, compiled, gather, take
from .exchange import UnevenExchange
from .payload import FORMS
from .placement import Order


@dataclass
class Plan:
    """Who sends what to whom, of one part of the tokens."""

    token: Tensor  # [S] the token of each row to be sent: by rank, then by token
    place: Tensor  # [N, ranks] the row of each token that goes to each rank; -1: none goes
    local: Tensor  # [S, K] its choices as experts of the rank where it goes; -1: not there
    sends: list[int]  # rows to each rank; their sum is S
    receives: list[int]  # rows from each rank; their sum is R
    routed: int  # M, the rows that this rank's experts will see


def by_rank(slots: Tensor, ranks: int, held: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The part of a plan that needs to hear of nobody, and no number of rows: those that are sent come first.

    Args:
        slots: [N, K] int64, the slots of each token's experts: slot s is expert s % held of rank s // held; -1: none.

    Returns:
        How many rows go to each rank, and how many choices are there [ranks, 2]; token [ranks N], local [ranks N, K]
        and place [N, ranks], as `Plan` has them.
    """
    owner = torch.where(slots < 0, -1, slots // held)  # [N, K]
    there = owner == torch.arange(ranks, device=slots.device)[:, None, None]  # [ranks, N, K]
    need = there.any(2)  # [ranks, N]: whether the token goes there
    order = (~need).flatten().to(torch.uint8).argsort(stable=True)  # [ranks N]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    place = torch.where(need, back.view_as(need), -1).T.contiguous()
    token, rank = order % len(slots), order // len(slots)
    local = torch.where(owner[token] == rank[:, None], slots[token] % held, -1)
    return torch.stack([need.sum(1), there.sum((1, 2))], 1), token, local, place


def plan(
    parts: Sequence[Tensor], axis: Axis, held: int, fuse: bool = False, expected: Callable[[int], int] | None = None
) -> list[Plan]:
    """Agree on who sends what to whom. Every rank of the axis must call it.

    Args:
        parts: [N, K] int64 each, slots as in `by_rank`.
        held: experts on each rank.
        fuse: compile what comes before the exchange.
        expected: rows of so many tokens, for a dry run: its tensors have no values, so nothing was decided.
    """
    ranks = axis.size
    mine = [(compiled(by_rank) if fuse else by_rank)(slots, ranks, held) for slots in parts]
    outgoing = torch.stack([numbers for numbers, *_ in mine], 1)  # [ranks, parts, 2]
    theirs, ones = torch.empty_like(outgoing), [1] * ranks
    all_to_all_async(theirs, outgoing, axis, ones, ones, "counts").wait()
    if expected is not None:
        numbers = [[[[to, to] for to in each] for each in _evenly(parts, ranks, expected)]] * 2
    else:
        numbers = torch.stack([outgoing, theirs]).tolist()  # the one point where the host waits for the GPU
    plans = []
    for number, (_, token, local, place) in enumerate(mine):
        sends, receives = ([to[number][0] for to in each] for each in numbers)
        rows = sum(sends)
        plans.append(Plan(token[:rows], place, local[:rows], sends, receives, sum(of[number][1] for of in numbers[1])))
    return plans


def _evenly(parts: Sequence[Tensor], ranks: int, expected: Callable[[int], int]) -> list[list[int]]:
    """Rows to each rank, of each part: [ranks, parts]."""
    rows = [expected(len(slots)) for slots in parts]
    return [[(rank + 1) * n // ranks - rank * n // ranks for n in rows] for rank in range(ranks)]


def part_sizes(tokens: int, parts: int) -> list[int]:
    """How many tokens each part has."""
    return [end - start for start, end in pairwise(i * tokens // parts for i in range(parts + 1))]


class SlotDispatch(ABC):
    """What each way to experts on other ranks begins with: to which slot, so to which rank, each choice goes.

    Args:
        axis: the ranks that hold the experts between them.
        num_experts: of the whole model.

    Attributes:
        held: slots on each rank.
        slot: [E, C] int64, the slots of each expert's copies, held * rank + place on that rank. None: expert e is in
            slot e.
        copies: [E] int64, how many there are; C is the largest number.
    """

    def __init__(self, axis: Axis, num_experts: int, layer: int = 0) -> None:
        self.axis, self.held, self.layer = axis, num_experts // axis.size, layer
        self.slot: Tensor | None = None
        self.copies: Tensor | None = None

    def place(self, order: Order, device: torch.device | None = None) -> None:
        """Send tokens to where experts are from now on.

        Args:
            order: the expert in each slot; those that come again are copies.
            device: of the tokens.
        """
        self.held, number = len(order) // self.axis.size, Counter(order)
        slots = [[slot for slot, e in enumerate(order) if e == expert] for expert in sorted(number)]
        filled = [each + each[:1] * (max(number.values()) - len(each)) for each in slots]
        self.slot = torch.tensor(filled, device=device)
        self.copies = torch.tensor([len(each) for each in slots], device=device)

    def _slots(self, experts: Tensor) -> Tensor:
        """The slots [N, K] to which tokens go: of copies of an expert each token takes the next."""
        slots = experts
        if self.slot is not None and self.copies is not None:
            turn = torch.arange(len(experts), device=experts.device)[:, None] + self.axis.index  # [N, 1]
            slots = torch.where(experts < 0, -1, self.slot[experts, turn % self.copies[experts]])
        for log in _LOGS:
            log.append((self.layer, slots.tolist()))
        return slots

    @abstractmethod
    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, run: Experts, shared: nn.Module | None) -> Tensor:
        """As `model.moe.local_dispatch`: x [N, D] -> [N, D]. Every rank of the axis calls it, with its own tokens."""


class ExpertDispatch(SlotDispatch):
    """`MoE.dispatch` for experts that are spread over an axis, to which rows travel one by one.

    Args:
        axis, num_experts, layer: as of `SlotDispatch`.
        parts: in how many the tokens are cut, to compute one while the next travels.
        payload: in what form rows and their gradients travel, one of `payload.FORMS`.

    Attributes:
        expected: see `plan`; None outside of a dry run.
    """

    def __init__(self, axis: Axis, num_experts: int, parts: int = 1, layer: int = 0, payload: str = "same") -> None:
        super().__init__(axis, num_experts, layer)
        self.parts = parts
        self.there, self.home = FORMS[payload]
        self.expected: Callable[[int], int] | None = None

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, run: Experts, shared: nn.Module | None) -> Tensor:
        """As `model.moe.local_dispatch`: x [N, D] -> [N, D]. Every rank of the axis calls it, with its own tokens."""
        slots = self._slots(experts)
        sizes = part_sizes(len(x), self.parts)
        # one part is not cut: its gradient would be copied
        xs, ws = (t.split(sizes) if self.parts > 1 else [t] for t in (x, weights))
        passes = run.passes
        plans = plan(slots.split(sizes), self.axis, self.held, passes is not PLAIN, self.expected)
        going = [self._start(*each, passes) for each in zip(xs, ws, plans, strict=True)]
        beside = None if shared is None else shared(x)
        coming = []
        for each, (rows, meta, trips) in zip(plans, going, strict=True):
            rows, meta = (trip.wait(arriving) for trip, arriving in zip(trips, (rows, meta), strict=True))
            local, weight = meta[:, experts.shape[1] :].detach().long(), meta[:, : experts.shape[1]]  # [R, K] each
            out = local_dispatch(rows, local, weight, run, routed=each.routed)  # [R, D]
            back = UnevenExchange(self.axis, each.receives, each.sends, self.home, self.there)
            coming.append((back, back.start(out)))
        found = [
            gather(back.wait(arriving), each.token, each.place, passes)
            for each, (back, arriving) in zip(plans, coming, strict=True)
        ]
        y = found[0] if self.parts == 1 else torch.cat(found)
        return y if beside is None else y + beside

    def _start(
        self, x: Tensor, weights: Tensor, plan: Plan, passes: Passes
    ) -> tuple[Tensor, Tensor, tuple[UnevenExchange, UnevenExchange]]:
        """Let rows set out, and beside them [S, 2 K] the weights and, exact in float32, which experts they are for."""
        wide = torch.promote_types(weights.dtype, torch.float32)
        splits = self.axis, plan.sends, plan.receives
        trips = UnevenExchange(*splits, self.there, self.home), UnevenExchange(*splits)
        rows = trips[0].start(take(x, plan.token, plan.place, passes))  # under way while the rest is made
        beside = [take(weights.to(wide), plan.token, plan.place, passes), plan.local.to(wide)]
        return rows, trips[1].start(torch.cat(beside, 1)), trips


_LOGS: list[list[tuple[int, list[list[int]]]]] = []


@contextmanager
def recording(wanted: bool = True) -> Iterator[list[tuple[int, list[list[int]]]]]:
    """Record, inside the `with` block, what every dispatch of this rank was asked for: its layer, and slots [N, K].

    Args:
        wanted: for a loop in which only some turns are recorded: a GPU would have to wait in each.
    """
    log: list[tuple[int, list[list[int]]]] = []
    if wanted:
        _LOGS.append(log)
    try:
        yield log
    finally:
        _LOGS[:] = [other for other in _LOGS if other is not log]
