"""Exercises of chapter 00, ranks and collectives: build one exchange from another, within a budget, and say who talks.

For each: the right answer, the mistakes that people make, and what tells them apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..collectives import all_reduce, all_to_all, ledger, shard_size
from ..config import MeshShape
from ..launch import launch
from ..mesh import Axis, Mesh, axis_of, coordinates
from .exercises import Exercise, Mistake, NotAttempted
from .rings import naive_all_reduce, ring_all_reduce, ring_seconds, tree_seconds

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
_BUDGET = {length: 2 * (RANKS - 1) * shard_size(length, RANKS) * 8 for length in LENGTHS}


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


def _over_budget(sent: int, length: int) -> str:
    return (
        f"the sum is right, and a rank sent {sent} bytes for {length} numbers; the budget is {_BUDGET[length]}. Send "
        "parts of ceil(L / n) numbers, and add on the way"
    )


_RING_HINTS = {
    "all_reduce": "this uses all_reduce; build it from send and receive",
    "half": "a rank has only one part of the sum: the second half, in which the whole parts go around, is missing",
    "tail": "the last L mod n numbers are this rank's own: parts of floor(L / n) leave them out",
    "padding": "the answer is longer than x: cut the padding off",
    "input": "x itself was changed; the caller still needs it",
}
_RINGS: tuple[Mistake, ...] = (
    Mistake("everything to everyone", naive_all_reduce, _over_budget((RANKS - 1) * LENGTHS[0] * 8, LENGTHS[0])),
    Mistake("asks the library", lambda x, axis: all_reduce(x, axis), _RING_HINTS["all_reduce"]),
    Mistake("half a ring", _half_way, _RING_HINTS["half"]),
    Mistake("tail lost", _tail_lost, _RING_HINTS["tail"]),
    Mistake("padding kept", _padding_kept, _RING_HINTS["padding"]),
    Mistake("in place", _in_place, _RING_HINTS["input"]),
)


def _ring_values(answer: Answer, axis: Axis) -> list[tuple[Any, Tensor, bool, dict[str, int]]]:
    out = []
    for length in LENGTHS:
        x = torch.arange(1.0, length + 1, dtype=torch.float64) + 100 * axis.index
        before = x.clone()
        with ledger.recording() as record:
            got = answer(x, axis)
        want = all_reduce(before, axis)
        out.append((got, want, torch.equal(x, before), {operation: n for (_, operation), n in record.items()}))
    return out


def _run_ring(answer: Answer) -> str | None:
    for results in _on_ranks(_ring_values, answer):
        for length, (got, want, untouched, sent) in zip(LENGTHS, results, strict=True):
            if set(sent) - {"send"}:
                return _RING_HINTS["all_reduce"]
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


# --- 3: who talks to whom ---------------------------------------------------------------------------------


def axis_ranks_stub(shape: MeshShape, rank: int, name: str) -> tuple[int, ...]:
    """The global ranks that `rank` works with along the axis `name` ("pp", "dp" or "tp"), itself included, in order.

    Args:
        shape: `shape.pp`, `shape.dp` and `shape.tp` are the sizes. Ranks are numbered with tp fastest, then dp.
    """
    raise NotAttempted


def axis_ranks(shape: MeshShape, rank: int, name: str) -> tuple[int, ...]:
    """The first of them is `rank` without its steps along the axis; from there it is one stride after another."""
    size = {"pp": shape.pp, "dp": shape.dp, "tp": shape.tp}[name]
    stride = {"tp": 1, "dp": shape.tp, "pp": shape.tp * shape.dp}[name]
    first = rank - rank // stride % size * stride
    return tuple(first + stride * step for step in range(size))


def _pp_fastest(shape: MeshShape, rank: int, name: str) -> tuple[int, ...]:
    size = {"pp": shape.pp, "dp": shape.dp, "tp": shape.tp}[name]
    stride = {"pp": 1, "dp": shape.pp, "tp": shape.pp * shape.dp}[name]
    first = rank - rank // stride % size * stride
    return tuple(first + stride * step for step in range(size))


def _neighbours(shape: MeshShape, rank: int, name: str) -> tuple[int, ...]:
    size = getattr(shape, name)
    return tuple(range(rank // size * size, rank // size * size + size))


_AXES: dict[str, tuple[Answer, str]] = {
    "pp fastest": (
        _pp_fastest,
        "this numbers the grid with pp fastest; tp is: rank = (pp_index * dp + dp_index) * tp + tp_index",
    ),
    "neighbours": (
        _neighbours,
        "only the tp axis is made of neighbouring ranks; two ranks that differ by one in dp_index are tp apart, and by "
        "one in pp_index dp * tp",
    ),
    "without itself": (
        lambda shape, rank, name: tuple(r for r in axis_ranks(shape, rank, name) if r != rank),
        "a rank is on its own axis: the group that an all_reduce works on includes it",
    ),
    "coordinates": (
        lambda shape, rank, name: tuple(range(getattr(shape, name))),
        "these are coordinates along the axis; asked are global ranks",
    ),
}
_SHAPES = [MeshShape(pp=pp, dp=dp, tp=tp) for pp, dp, tp in itertools.product((1, 2, 3), repeat=3)]
_QUESTIONS = [(s, rank, name) for s in _SHAPES for rank in range(s.world_size) for name in ("pp", "dp", "tp")]


def _run_axes(answer: Answer) -> str | None:
    got = [tuple(answer(*question)) for question in _QUESTIONS]
    if got == [axis_of(*question).ranks for question in _QUESTIONS]:
        return None
    for wrong, hint in _AXES.values():
        if got == [wrong(*question) for question in _QUESTIONS]:
            return hint
    at = next(i for i, q in enumerate(_QUESTIONS) if got[i] != axis_of(*q).ranks)
    shape, rank, name = _QUESTIONS[at]
    where = f"rank {rank} of {shape} has coordinates {coordinates(shape, rank)}"
    return f"{where}; its {name} axis is {axis_of(shape, rank, name).ranks}, not {got[at]}"


# --- 4: tree or ring --------------------------------------------------------------------------------------


def crossover_stub(ranks: int, latency: float, bandwidth: float) -> float:
    """From how many bytes on is the ring as fast as the tree, in the alpha-beta model?

    Args:
        ranks: n, a power of two, at least 4. The ring has 2 (n - 1) steps of S/n bytes, the tree 2 log2 n of S.
        latency: seconds of an empty message.
        bandwidth: bytes a second over one link.
    """
    raise NotAttempted


def crossover(ranks: int, latency: float, bandwidth: float) -> float:
    """Set both times equal: S/bandwidth (log n - (n-1)/n) = latency (n - 1 - log n)."""
    depth = math.log2(ranks)
    return latency * bandwidth * (ranks - 1 - depth) / (depth - (ranks - 1) / ranks)


_CROSSOVERS: dict[str, tuple[Answer, str]] = {
    "one message": (
        lambda ranks, latency, bandwidth: latency * bandwidth,
        "at latency * bandwidth one message waits as long as it travels; count how many messages each of the two sends",
    ),
    "whole messages in the ring": (
        lambda ranks, latency, bandwidth: math.inf,
        "with whole tensors in each step the ring would never win; its messages have S/n bytes",
    ),
    "many ranks": (
        lambda ranks, latency, bandwidth: latency * bandwidth * (ranks - 1 - math.log2(ranks)) / (math.log2(ranks) - 1),
        "(n - 1)/n was taken for 1; with 4 ranks it is 0.75, and the answer changes by a quarter",
    ),
    "bandwidth upside down": (
        lambda ranks, latency, bandwidth: crossover(ranks, latency, 1 / bandwidth),
        "the unit is off: bandwidth is in bytes a second, so S bytes take S / bandwidth",
    ),
}
_LINKS = [(n, latency, bandwidth) for n in (4, 8, 64) for latency in (1e-6, 5e-5) for bandwidth in (1e9, 3e11)]


def _run_crossover(answer: Answer) -> str | None:
    def like(other: Answer) -> bool:
        return all(math.isclose(answer(*link), other(*link), rel_tol=1e-6) for link in _LINKS)

    if like(crossover):
        return None
    for wrong, hint in _CROSSOVERS.values():
        if like(wrong):
            return hint
    ranks, latency, bandwidth = next(link for link in _LINKS if not math.isclose(answer(*link), crossover(*link)))
    size = answer(ranks, latency, bandwidth)
    ring, tree = (f(size, ranks, latency, bandwidth) for f in (ring_seconds, tree_seconds))
    return f"at {size:.3g} bytes on {ranks} ranks the ring takes {ring:.3g} s and the tree {tree:.3g} s"


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
        task="The ring of the lesson needs a length that the number of ranks divides. Write one that takes any length: "
        "the same sum on every rank, and no rank sends more than 2 (n - 1) ceil(L / n) numbers.",
        stub=ring_of_any_length_stub,
        reference=ring_of_any_length,
        mistakes=_RINGS,
        run=_run_ring,
    ),
    Exercise(
        id="00.axis_ranks",
        title="Who talks to whom",
        task="Given the mesh and a rank, name the ranks that it works with along one axis.",
        stub=axis_ranks_stub,
        reference=axis_ranks,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _AXES.items()),
        run=_run_axes,
    ),
    Exercise(
        id="00.crossover",
        title="Tree or ring",
        task="Small tensors are summed faster by a tree, large ones by a ring. Find the size where they are equal.",
        stub=crossover_stub,
        reference=crossover,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _CROSSOVERS.items()),
        run=_run_crossover,
    ),
]
