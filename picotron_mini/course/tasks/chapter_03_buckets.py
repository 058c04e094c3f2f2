"""Exercises of chapter 03, data parallelism: which gradients travel together, and when.

The checkers take the order in which gradients become ready from a real backward pass, and compare what two ranks
would do that see different orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...launch import launch
from ..exercises import Exercise, Mistake, NotAttempted

Answer = Callable[..., Any]


# --- which parameters share a bucket -------------------------------------------------------------------


def buckets_stub(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Group parameters, so that a group's reduction starts as early as possible and no message is tiny.

    Args:
        sizes: elements of each parameter, in the order of the forward pass.
        limit: a bucket that has reached this many elements is closed.

    Returns:
        The parameters' indices, bucket by bucket, in the order in which the buckets become complete in backward.
    """
    raise NotAttempted


def buckets(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """From the last parameter to the first; a new bucket once the current one is full."""
    out: list[list[int]] = [[]]
    for index in reversed(range(len(sizes))):
        if sum(sizes[i] for i in out[-1]) >= limit:
            out.append([])
        out[-1].append(index)
    return out


_ORDER = "backward reaches the last parameters first: a first bucket with early layers waits for all of backward"
_SMALL = "a bucket was closed before it reached the limit: more messages than needed, and each costs its latency"
_EMPTY = "an empty bucket is a message about nothing: open a bucket only when a parameter is there to go into it"
_LARGE = "a bucket that had reached the limit took one more parameter: its reduction starts later than it could"
_MISSING = "each parameter must be in exactly one bucket, also one that is larger than the limit"


def _ready_order(sizes: Sequence[int]) -> list[int]:
    """The order in which a real backward completes gradients of a chain of layers."""
    weights = [nn.Parameter(torch.ones(size)) for size in sizes]
    order: list[int] = []
    for index, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(lambda _, i=index: order.append(i))
    x = torch.ones(())
    for weight in weights:
        x = torch.tanh(x * weight.mean())
    x.backward()
    return order


def _run_buckets(answer: Answer) -> str | None:
    for sizes, limit in (([4, 4, 4, 4, 4], 8), ([3, 100, 5, 2, 9, 1, 1], 10), ([7], 50), ([4, 4], 8)):
        place = {index: at for at, index in enumerate(_ready_order(sizes))}
        # a bucket is complete with its last gradient, so the order inside it does not matter
        got = [sorted(group, key=lambda i: place.get(i, -1)) for group in answer(list(sizes), limit)]
        if not all(got):
            return _EMPTY
        if sorted(i for group in got for i in group) != list(range(len(sizes))):
            return _MISSING
        if [i for group in got for i in group] != _ready_order(sizes):
            return _ORDER
        if any(sum(sizes[i] for i in group) < limit for group in got[:-1]):
            return _SMALL
        if any(sum(sizes[i] for i in group[:-1]) >= limit for group in got):
            return _LARGE
    return None


def _one_open(sizes: Sequence[int], limit: int) -> list[list[int]]:
    groups = buckets(sizes, limit)
    return [*groups, []] if sum(sizes[i] for i in groups[-1]) >= limit else groups


def _forward_order(sizes: Sequence[int], limit: int) -> list[list[int]]:
    order = range(len(sizes))
    return [[order[-1 - i] for i in group] for group in buckets(sizes[::-1], limit)]


def _keep_below(sizes: Sequence[int], limit: int) -> list[list[int]]:
    out: list[list[int]] = [[]]
    for index in reversed(range(len(sizes))):
        if out[-1] and sum(sizes[i] for i in out[-1]) + sizes[index] > limit:
            out.append([])
        out[-1].append(index)
    return out


def _leave_large_out(sizes: Sequence[int], limit: int) -> list[list[int]]:
    return [group for group in buckets(sizes, limit) if sum(sizes[i] for i in group) < 10 * limit]


# --- when a bucket may start ---------------------------------------------------------------------------


def start_order_stub(completed: Sequence[int]) -> list[list[int]]:
    """Say which reductions start at which moment, so that all ranks start the same ones in the same order.

    Args:
        completed: bucket numbers in the order in which they become complete on *this* rank. Another rank may see
            another order.

    Returns:
        For each entry of `completed`, the buckets whose reduction starts then, in order; often none.
    """
    raise NotAttempted


def start_order(completed: Sequence[int]) -> list[list[int]]:
    """Bucket k starts when it and all before it are complete."""
    done: set[int] = set()
    out, following = [], 0
    for number in completed:
        done.add(number)
        now = []
        while following in done:
            now.append(following)
            following += 1
        out.append(now)
    return out


def _rest_at_the_end(completed: Sequence[int]) -> list[list[int]]:
    out = _start_one_each(completed)
    out[-1] += range(sum(map(len, out)), len(completed))
    return out


def _start_one_each(completed: Sequence[int]) -> list[list[int]]:
    done: set[int] = set()
    out, following = [], 0
    for number in completed:
        done.add(number)
        out.append([following] if following in done else [])
        following += following in done
    return out


_DIFFERENT = (
    "the ranks start their reductions in different orders: the first sums of one rank meet other sums of its "
    "neighbour, and the values are wrong or all wait for ever; bucket k must start after bucket k - 1"
)
_INCOMPLETE = "a reduction was started before its bucket was complete"
_FORGOTTEN = "some reductions never start: one bucket may be what several complete ones behind it have waited for"
_LATE = "right, and slow: a bucket that is complete, and whose predecessors have started, must start at once"


def _on_rank(answer: Answer) -> tuple[list[int], Any]:
    completed = [[0, 1, 2, 3], [2, 0, 3, 1]][dist.get_rank()]
    return completed, answer(list(completed))


def _run_start_order(answer: Answer) -> str | None:
    results = launch(_on_rank, answer, world_size=2, timeout=60, output="hide")
    flat = [[k for moment in got for k in moment] for _, got in results]
    if any(sorted(order) != sorted(set(order)) or len(order) < 4 for order in flat):
        return _FORGOTTEN
    if flat[0] != flat[1]:
        return _DIFFERENT
    for completed, got in results:
        for moment, started in enumerate(got):
            if not set(started) <= set(completed[: moment + 1]):
                return _INCOMPLETE
        if got != start_order(completed):
            return _LATE
    for order in permutations(range(4)):  # a rank may see any order
        got = answer(list(order))
        if got != start_order(order):
            return _LATE if [k for moment in got for k in moment] == list(range(4)) else _FORGOTTEN
    return None


EXERCISES = [
    Exercise(
        id="03.buckets",
        title="Which gradients travel together",
        task="Group parameters into buckets that are complete as early in backward as possible, and not smaller than "
        "the limit (but for the last).",
        stub=buckets_stub,
        reference=buckets,
        mistakes=(
            Mistake("order of the forward pass", _forward_order, _ORDER),
            Mistake("one each", lambda sizes, limit: [[i] for i in reversed(range(len(sizes)))], _SMALL),
            Mistake("kept below the limit", _keep_below, _SMALL),
            Mistake("one for all", lambda sizes, limit: [list(reversed(range(len(sizes))))], _LARGE),
            Mistake("large ones left out", _leave_large_out, _MISSING),
            Mistake("one left open", _one_open, _EMPTY),
        ),
        run=_run_buckets,
    ),
    Exercise(
        id="03.start_order",
        title="When a reduction may start",
        task="Buckets become complete in another order on each rank. Decide at each completion which reductions to "
        "start, so that no two ranks disagree and none waits longer than it must.",
        stub=start_order_stub,
        reference=start_order,
        mistakes=(
            Mistake("as they come", lambda completed: [[k] for k in completed], _DIFFERENT),
            Mistake("by number", lambda completed: [[k] for k in sorted(completed)], _INCOMPLETE),
            Mistake("one at a time", _start_one_each, _FORGOTTEN),
            Mistake("one at a time, the rest at the end", _rest_at_the_end, _LATE),
            Mistake("all at the end", lambda done: [[] for _ in done[1:]] + [sorted(done)], _LATE),
        ),
        run=_run_start_order,
    ),
]
