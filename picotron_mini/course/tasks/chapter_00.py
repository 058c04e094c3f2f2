"""Exercises of chapter 00, ranks and collectives: build one exchange from another, within a budget, and say who talks.

For each: the right answer, the mistakes that people make, and what tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...collectives import all_reduce, all_to_all, ledger, receive, send, shard_size
from ...config import MeshShape
from ...launch import RankError, launch
from ...mesh import Axis, Mesh
from ..exercises import Exercise, Mistake, NotAttempted
from ..instruments.witness import Witness
from ..rings import naive_all_reduce, ring_all_reduce

RANKS = 3  # with two, many a wrong order looks right
Answer = Callable[..., Any]


def _on_ranks(fn: Callable[..., Any], answer: Answer) -> list[Any]:
    return launch(_with_axis, fn, answer, world_size=RANKS, timeout=60, output="hide")


def _with_axis(fn: Callable[..., Any], answer: Answer) -> Any:
    return fn(answer, Mesh.build(MeshShape(dp=RANKS))["dp"])


def _same(got: Any, want: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == want.shape and torch.equal(got, want)


# --- 1: one collective from another -----------------------------------------------------------------------


def reduce_scatter_stub(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, of which each rank keeps its own part. Use `all_to_all(x, axis)` and no other collective.

    Args:
        x: [n K], different on each rank; n is the axis' size.

    Returns:
        [K]: on the rank with index r the sum over the ranks of their part r.
    """
    raise NotAttempted


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """all_to_all brings this rank everyone's part for it; what is left is to add them."""
    return all_to_all(x, axis).view(axis.size, -1).sum(0)


_SCATTERS: dict[str, tuple[Answer, str]] = {
    "not added": (
        lambda x, axis: all_to_all(x, axis),
        "the parts have arrived, one behind the other, and were not added",
    ),
    "neighbours added": (
        lambda x, axis: all_to_all(x, axis).view(-1, axis.size).sum(1),
        "numbers of one rank were added to each other: after the exchange the first K numbers are rank 0's part, the "
        "next K rank 1's; add across ranks",
    ),
    "nothing sent": (
        lambda x, axis: x.view(axis.size, -1).sum(0),
        "this adds the parts of this rank's own x; nothing came from another rank",
    ),
    "a mean": (
        lambda x, axis: all_to_all(x, axis).view(axis.size, -1).mean(0),
        "this is the mean of the ranks, not their sum",
    ),
    "everyone's": (
        lambda x, axis: all_reduce(x, axis),
        "this is the whole sum on every rank, at the price of an all_reduce; use all_to_all, and keep this rank's part",
    ),
    "the same part on all": (
        lambda x, axis: all_reduce(x, axis)[: len(x) // axis.size],
        "every rank returns part 0 of the sum; the rank with index r keeps part r",
    ),
    "each part added up": (
        lambda x, axis: all_to_all(x, axis).view(axis.size, -1).sum(1),
        "each arrived part was added up to one number; add the parts to each other, element by element",
    ),
    "one number": (
        lambda x, axis: all_to_all(x, axis).sum(),
        "all that arrived was added up to a single number; the answer has K of them",
    ),
    "this rank's part of what arrived": (
        lambda x, axis: all_to_all(x, axis).chunk(axis.size)[axis.index],
        "this is what the rank itself had of its part: all_to_all has chosen the part already, and what arrived are "
        "the shares of all ranks in it, to be added",
    ),
    "rank 0's share": (
        lambda x, axis: all_to_all(x, axis).chunk(axis.size)[0],
        "this is rank 0's share of the part alone; the shares of all ranks have arrived, to be added",
    ),
}


def _scatter_values(answer: Answer, axis: Axis) -> tuple[Any, Tensor, dict[str, Tensor], set[str]]:
    x = torch.arange(4.0 * RANKS) ** 2 + 100 * axis.index
    with ledger.recording() as record:
        got = answer(x.clone(), axis)
    known = {name: wrong(x.clone(), axis) for name, (wrong, _) in _SCATTERS.items()}
    return got, reduce_scatter(x, axis), known, {operation for _, operation in record}


def _run_scatter(answer: Answer) -> str | None:
    results = _on_ranks(_scatter_values, answer)
    for name, (_, hint) in _SCATTERS.items():
        # on all ranks, since on one of them a wrong answer may be right by chance
        if all(_same(got, known[name]) for got, _, known, _ in results):
            return hint
    for rank, (got, want, _, used) in enumerate(results):
        if not _same(got, want):
            return f"on rank {rank} the answer is {got} and should be {want}"
        if used != {"all_to_all"}:
            return f"the sum is right, with {', '.join(sorted(used)) or 'nothing sent'}; all_to_all is enough"
    return None


# --- 2: a ring, for any length, within a budget -----------------------------------------------------------


def ring_of_any_length_stub(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis, on every rank, with `send` and `receive` only, as a new tensor.

    Budget: each rank sends at most 2 (n - 1) ceil(L / n) numbers. You may start from `ring_all_reduce`.

    Args:
        x: [L], where n need not divide L.
    """
    raise NotAttempted


def ring_of_any_length(x: Tensor, axis: Axis) -> Tensor:
    """Pad to the next multiple of n, go around, and cut the padding off again."""
    padded = x.new_zeros(axis.size * shard_size(len(x), axis.size))
    padded[: len(x)] = x
    return ring_all_reduce(padded, axis)[: len(x)]


LENGTHS = (9, 10)
SHORT = (4, 1)  # of which `chunk` makes fewer parts than there are ranks
_BUDGET = {length: 2 * (RANKS - 1) * shard_size(length, RANKS) * 8 for length in (*LENGTHS, *SHORT)}


def _tail_lost(x: Tensor, axis: Axis) -> Tensor:
    even = len(x) // axis.size * axis.size
    return torch.cat([ring_all_reduce(x[:even], axis), x[even:]])


def _padding_kept(x: Tensor, axis: Axis) -> Tensor:
    missing = -len(x) % axis.size
    return ring_all_reduce(torch.cat([x, x.new_zeros(missing)]), axis)


def _in_place(x: Tensor, axis: Axis) -> Tensor:
    return x.copy_(ring_of_any_length(x, axis))


def _half_way(x: Tensor, axis: Axis) -> Tensor:
    """What the first half of the ring leaves: this rank's one whole part, and its own numbers elsewhere."""
    out, size = x.clone(), shard_size(len(x), axis.size)
    mine = slice((axis.index + 1) % axis.size * size, ((axis.index + 1) % axis.size + 1) * size)
    out[mine] = ring_of_any_length(x, axis)[mine]
    return out


def _in_chunks(x: Tensor, axis: Axis) -> Tensor:
    """A ring over the parts that `chunk` makes, whatever their lengths."""
    n, r = axis.size, axis.index
    out = x.clone()
    parts = out.chunk(n)
    for step in range(2 * (n - 1)):
        adding = step < n - 1
        outgoing, place = parts[(r - step) % n], parts[(r - step - 1) % n]
        arrived = torch.empty_like(place)
        works = [send(outgoing.clone(), axis, (r + 1) % n), receive(arrived, axis, (r - 1) % n)]
        for work in works:
            work.wait()
        place.copy_(place + arrived if adding else arrived)
    return out


def _behind_the_ledger(x: Tensor, axis: Axis) -> Tensor:
    out = x.clone()
    dist.all_reduce(out, group=axis.group)
    return out


def _over_budget(sent: int, length: int) -> str:
    return (
        f"the sum is right, and a rank sent {sent} bytes for {length} numbers; the budget is {_BUDGET[length]}. Send "
        "parts of ceil(L / n) numbers, and add on the way"
    )


_RING_HINTS = {
    "all_reduce": "this uses all_reduce; build it from send and receive",
    "torch.distributed": "this calls torch.distributed itself, which the ledger does not see and the witness does; "
    "build the sum from collectives.send and collectives.receive",
    "half": "a rank has only one part of the sum: the second half, in which the whole parts go around, is missing",
    "tail": "the last L mod n numbers are this rank's own: parts of floor(L / n) leave them out",
    "padding": "the answer is longer than x: cut the padding off",
    "input": "x itself was changed; the caller still needs it",
    "uneven": "for 9 numbers on 3 ranks it may work, for 10 it does not: their parts are 4, 4 and 2, and a message "
    "arrives in a buffer of another size; make the parts equal first",
    "chunk": "right for 10 numbers on 3 ranks, and not for 4: `chunk(3)` makes parts of ceil(4 / 3) = 2 numbers, so "
    "there are two of them and no third; make the parts yourself, one for each rank, or pad first",
}
_RINGS: tuple[Mistake, ...] = (
    Mistake("everything to everyone", naive_all_reduce, _over_budget((RANKS - 1) * LENGTHS[0] * 8, LENGTHS[0])),
    Mistake("asks the library", lambda x, axis: all_reduce(x, axis), _RING_HINTS["all_reduce"]),
    Mistake("asks torch", _behind_the_ledger, _RING_HINTS["torch.distributed"]),
    Mistake("the ring of the lesson", ring_all_reduce, _RING_HINTS["uneven"]),
    Mistake("half a ring", _half_way, _RING_HINTS["half"]),
    Mistake("tail lost", _tail_lost, _RING_HINTS["tail"]),
    Mistake("padding kept", _padding_kept, _RING_HINTS["padding"]),
    Mistake("in place", _in_place, _RING_HINTS["input"]),
    Mistake("parts by chunk", _in_chunks, _RING_HINTS["chunk"]),
)


def _ring_values(
    answer: Answer, axis: Axis, lengths: tuple[int, ...]
) -> list[tuple[Any, Tensor, bool, dict[str, int]]]:
    out = []
    for length in lengths:
        x = torch.arange(1.0, length + 1, dtype=torch.float64) + 100 * axis.index
        before = x.clone()
        with ledger.recording() as record, Witness() as witness:
            got = answer(x, axis)
        want = all_reduce(before, axis)
        sent = {operation: n for (_, operation), n in record.items()}
        if witness.bytes != sent:
            sent["torch.distributed"] = 0  # something went past the ledger
        out.append((got, want, torch.equal(x, before), sent))
    return out


def _run_ring(answer: Answer) -> str | None:
    for lengths, hint in ((LENGTHS, _RING_HINTS["uneven"]), (SHORT, _RING_HINTS["chunk"])):
        try:
            found = _judge_ring(_on_ranks(partial(_ring_values, lengths=lengths), answer), lengths)
        except RankError as error:
            parts = ("IndexError", "preamble.length", "size of tensor a", "expanded size of the tensor")
            if any(word in str(error) for word in parts):
                return hint
            raise
        if found:
            return found
    return None


def _judge_ring(values: list[Any], lengths: tuple[int, ...]) -> str | None:
    for results in values:
        for length, (got, want, untouched, sent) in zip(lengths, results, strict=True):
            for known in ("torch.distributed", "all_reduce"):
                if known in sent:
                    return _RING_HINTS[known]
            if set(sent) - {"send"}:
                return f"this uses {', '.join(sorted(set(sent) - {'send'}))}; build it from send and receive"
            if isinstance(got, Tensor) and len(got) > length and torch.equal(got[:length], want):
                return _RING_HINTS["padding"]
            if not _same(got, want):
                right = (got == want) if isinstance(got, Tensor) and got.shape == want.shape else torch.tensor([False])
                if length % RANKS and bool(right[: -(length % RANKS)].all()):
                    return _RING_HINTS["tail"]
                if bool(right.any()):
                    return _RING_HINTS["half"]
                return f"for {length} numbers the answer is {got} and should be {want}"
            if not untouched:
                return _RING_HINTS["input"]
            if sent.get("send", 0) > _BUDGET[length]:
                return _over_budget(sent["send"], length)
    return None


EXERCISES = [
    Exercise(
        id="00.reduce_scatter",
        title="One collective from another",
        task="Write reduce_scatter with all_to_all and a sum.",
        stub=reduce_scatter_stub,
        reference=reduce_scatter,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _SCATTERS.items()),
        run=_run_scatter,
    ),
    Exercise(
        id="00.ring_of_any_length",
        title="A ring within a budget",
        task="The ring of the lesson needs a length that the number of ranks divides. Write one that takes any length, "
        "also less than n: the same sum on every rank, and no rank sends more than 2 (n - 1) ceil(L / n) numbers.",
        stub=ring_of_any_length_stub,
        reference=ring_of_any_length,
        mistakes=_RINGS,
        run=_run_ring,
    ),
]
