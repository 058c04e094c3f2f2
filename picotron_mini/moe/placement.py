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

The order of experts in slots, slot s on rank s // (E/ep), is all that a placement is: `order[s]` is the expert there.
Where an expert is does not change what it computes, so a new placement may come in the middle of a run:
`training/migrate.py` moves weights and optimizer state.

Cost of a move, once: each expert that changes its rank, 3 D I numbers in each of masters and optimizer state (AdamW: 3
tensors), and the weights where they are not the masters.
Gain, every step: the time of the experts and of the exchange, which follow the busiest rank.

Papers: greedy scheduling, Graham (SIAM J. Appl. Math. 17, 1969); experts by load, in inference: DeepSeek-V3 (arXiv
2412.19437).
Legend: E experts, D width, I inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

Order = tuple[int, ...]  # the expert in each slot


def by_number(experts: int) -> Order:
    """Expert e in slot e."""
    return tuple(range(experts))


def by_load(load: Sequence[float], ranks: int, now: Order | None = None) -> Order:
    """Spread experts so that the busiest rank has little to do, longest first.

    Args:
        load: of each expert, in any unit.
        ranks: over how many; divides the number of experts.
        now: the placement so far; None: by number.

    Returns:
        The new order, with as many experts as possible where they are now; all of them, if it would be no better.
    """
    now = now or by_number(len(load))
    held = len(load) // ranks
    sets: list[list[int]] = [[] for _ in range(ranks)]
    for expert in sorted(range(len(load)), key=lambda e: (-load[e], e)):
        room = [i for i in range(ranks) if len(sets[i]) < held]
        sets[min(room, key=lambda i: (sum(load[e] for e in sets[i]), i))].append(expert)
    order: list[int] = [-1] * len(load)
    homes = {rank: {*now[rank * held : (rank + 1) * held]} for rank in range(ranks)}
    while homes:  # the pair of set and rank that has most in common first
        pairs = [(rank, each) for rank in homes for each in sets]
        rank, chosen = max(pairs, key=lambda pair: len(homes[pair[0]] & {*pair[1]}))
        _settle(chosen, rank * held, now, order)
        sets.remove(chosen)
        del homes[rank]
    return tuple(order) if imbalance(load, tuple(order), ranks) < imbalance(load, now, ranks) else now


def _settle(experts: list[int], start: int, now: Order, order: list[int]) -> None:
    """Give experts the slots from `start` on; those that were there keep theirs."""
    slots = range(start, start + len(experts))
    left = sorted({*experts} - {now[slot] for slot in slots})
    for slot in slots:
        order[slot] = now[slot] if now[slot] in experts else left.pop(0)


def load_of_ranks(load: Sequence[float], order: Order, ranks: int) -> list[float]:
    """The load of each rank's experts."""
    held = len(order) // ranks
    return [sum(load[e] for e in order[rank * held : (rank + 1) * held]) for rank in range(ranks)]


def imbalance(load: Sequence[float], order: Order, ranks: int) -> float:
    """The busiest rank's load over the mean: 1 at best, `ranks` at worst."""
    loads = load_of_ranks(load, order, ranks)
    return max(loads) * ranks / sum(loads) if sum(loads) else 1.0


def moves(before: Order, after: Order, ranks: int) -> list[tuple[int, int, int]]:
    """Which experts change their rank: (expert, from, to)."""
    held = len(before) // ranks
    was = {expert: slot // held for slot, expert in enumerate(before)}
    found = [(expert, was[expert], slot // held) for slot, expert in enumerate(after)]
    return sorted(move for move in found if move[1] != move[2])
