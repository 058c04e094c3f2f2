"""Placement: which rank holds which experts. By number, or by how busy they are.

All ranks of an ep group wait for the busiest, so what counts is its load over the mean. Experts in the order of their
numbers are as good as any other order while they are equally busy. Seldom they are:

    load of experts 0 ... 7    40 30 10  5   5  5  3  2        100 choices
    by number, two ranks       0 1 2 3: 85   4 5 6 7: 15       busiest over mean: 1.70
    by load                    0 3 5 7: 52   1 2 4 6: 48                          1.04

Greedy, longest first: take the experts from the busiest to the idlest, each to the rank that has least so far and room
left (every rank has E/ep *slots*). It is at most 4/3 of the best for machines without a limit of jobs (Graham 1969),
and here E is small. Which of the ranks gets which set is free, so the set goes where most of it is already, and an
expert that stays keeps its slot.

**Copies.** An expert with 40 of 100 choices is too much for each of four ranks, wherever it is. So let each rank have
R slots more (`--expert-replicas R`), for copies of the busiest: E + ep R slots, and each slot beyond E goes to the
expert whose copies have most to do. Each of c copies has 1/c of the load (`dispatch.py` deals tokens out in turn):

    four ranks, R = 0    0 7: 42    2 5: 15    3 4: 10    1 6: 33                       busiest over mean 1.68
                R = 1    0 1 6: 26.3    0 3 4: 23.3    1 2 5: 25    0 1 7: 25.3                          1.05

The order of experts in slots, slot s on rank s // (E/ep + R), is all that a placement is: `order[s]` is the expert
there. Where an expert is does not change what it computes, so a new placement may come in the middle of a run:
`training/migrate.py` moves weights and optimizer state.

Cost of a move, once: each expert that changes its rank, 3 D I numbers in each of masters and optimizer state (AdamW: 3
tensors), and the weights where they are not the masters.
Gain, every step: the time of the experts and of the exchange, which follow the busiest rank.
Copies cost memory, R slots of weights, gradients and state, and bytes every step: gradients of copies are summed
(`parallel/replicas.py`).

Papers: greedy scheduling, Graham (SIAM J. Appl. Math. 17, 1969); experts by load, and copies of busy ones, in
inference: DeepSeek-V3 (arXiv 2412.19437).
Legend: E experts, D width, I inner width of an expert, R slots for copies on each rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Order = tuple[int, ...]  # the expert in each slot
Holders = dict[int, dict[int, int]]  # of each expert the ranks that have a copy, and its row there


def by_number(experts: int, ranks: int = 1, replicas: int = 0) -> Order:
    """Expert e in slot e; with slots for copies each rank also has the next rank's first ones."""
    held = experts // ranks
    return tuple((rank * held + i) % experts for rank in range(ranks) for i in range(held + replicas))


def copies(load: Sequence[float], ranks: int, slots: int) -> list[int]:
    """How many copies each expert gets: a slot after the other to the one whose copies have most to do."""
    out = [1] * len(load)
    for _ in range(slots - len(load)):
        room = [e for e, number in enumerate(out) if number < ranks]  # never two on one rank
        out[max(room, key=lambda e: (load[e] / out[e], -e))] += 1
    return out


def by_load(load: Sequence[float], ranks: int, now: Order | None = None) -> Order:
    """Spread experts so that the busiest rank has little to do, longest first.

    Args:
        load: of each expert, in any unit.
        ranks: over how many; divides the number of experts.
        now: the placement so far, which says how many slots there are; None: by number, a slot for each expert.

    Returns:
        The new order, with as many experts as possible where they are now; all of them, if it would be no better.
    """
    now = now or by_number(len(load))
    held, number = len(now) // ranks, copies(load, ranks, len(now))
    sets = pack([each / n for each, n in zip(load, number, strict=True)], number, ranks)
    order: list[int] = [-1] * len(now)
    homes = {rank: {*now[rank * held : (rank + 1) * held]} for rank in range(ranks)}
    while homes:  # the pair of set and rank that has most in common first
        pairs = [(rank, each) for rank in homes for each in sets]
        rank, chosen = max(pairs, key=lambda pair: len(homes[pair[0]] & {*pair[1]}))
        _settle(chosen, rank * held, now, order)
        sets.remove(chosen)
        del homes[rank]
    return tuple(order) if imbalance(load, tuple(order), ranks) < imbalance(load, now, ranks) else now


def pack(share: Sequence[float], number: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each rank as many copies of experts as any other, longest first, and never two of one expert.

    Args:
        share: of each expert, the load of one copy.
        number: of each expert, how many copies; their sum divides by `ranks`, and none is above it.
    """
    held = sum(number) // ranks
    sets: list[list[int]] = [[] for _ in range(ranks)]

    def idlest(of: list[list[int]]) -> list[int]:
        return min(of, key=lambda each: sum(share[e] for e in each))

    for expert in sorted((e for e, n in enumerate(number) for _ in range(n)), key=lambda e: (-share[e], e)):
        room, without = [each for each in sets if len(each) < held], [each for each in sets if expert not in each]
        if both := [each for each in room if expert not in each]:
            idlest(both).append(expert)
        else:  # who has room has it already: another takes it, and hands one of its own on
            giver, taker = idlest(without), idlest(room)
            given = min((e for e in giver if e not in taker), key=lambda e: share[e])
            giver[giver.index(given)] = expert
            taker.append(given)
    return sets


def _settle(experts: list[int], start: int, now: Order, order: list[int]) -> None:
    """Give experts the slots from `start` on; those that were there keep theirs."""
    slots = range(start, start + len(experts))
    left = sorted({*experts} - {now[slot] for slot in slots})
    for slot in slots:
        order[slot] = now[slot] if now[slot] in experts else left.pop(0)


def load_of_ranks(load: Sequence[float], order: Order, ranks: int) -> list[float]:
    """The load of each rank's experts; an expert's copies share its load."""
    held, number = len(order) // ranks, Counter(order)
    return [sum(load[e] / number[e] for e in order[rank * held : (rank + 1) * held]) for rank in range(ranks)]


def imbalance(load: Sequence[float], order: Order, ranks: int) -> float:
    """The busiest rank's load over the mean: 1 at best, `ranks` at worst."""
    loads = load_of_ranks(load, order, ranks)
    return max(loads) * ranks / sum(loads) if sum(loads) else 1.0


def holders(order: Order, ranks: int, rows: int = 0) -> Holders:
    """Who keeps which expert.

    Args:
        ranks: of ep.
        rows: with ZeRO, how many of its slots each edp rank owns; who keeps masters is then told along dp and cp, of
            which ep are neighbours. 0: a rank keeps all its slots, and is told along ep.
    """
    held, out = len(order) // ranks, Holders()
    for slot, expert in enumerate(order):
        rank, row = divmod(slot, held)
        rank, row = (row // rows * ranks + rank, row % rows) if rows else (rank, row)
        out.setdefault(expert, {})[rank] = row
    return out


def journeys(was: Holders, will: Holders) -> list[tuple[int, int, int]]:
    """What travels for a new placement: (expert, from, to) for each rank that gets an expert which it has not.

    Of several ranks that have it, each sends to some: the one of number `to` modulo their number.
    """
    out = []
    for expert, ranks in will.items():
        sources = sorted(was[expert])
        out += [(expert, sources[to % len(sources)], to) for to in ranks if to not in was[expert]]
    return sorted(out)


def moves(before: Order, after: Order, ranks: int) -> list[tuple[int, int, int]]:
    """Which experts come to a rank that had them not: (expert, from, to)."""
    return journeys(holders(before, ranks), holders(after, ranks))
