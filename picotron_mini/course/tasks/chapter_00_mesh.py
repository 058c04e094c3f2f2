"""Exercises of chapter 00, without ranks: who talks to whom on a mesh, and from which size on a ring beats a tree.

Both answers are formulas, and the checkers hold them to the library's own (`mesh.axis_of`, `rings.ring_seconds`) on
many meshes and links.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from ...config import AXES, MeshShape
from ...mesh import axis_of, coordinates
from ..exercises import Exercise, Mistake, NotAttempted
from ..rings import ring_seconds, tree_seconds

Answer = Callable[..., Any]


# --- who talks to whom ------------------------------------------------------------------------------------


def axis_ranks_stub(shape: MeshShape, rank: int, name: str) -> tuple[int, ...]:
    """The global ranks that `rank` works with along the axis `name`, itself included, in order.

    Args:
        shape: `shape.pp`, `shape.dp`, `shape.cp` and `shape.tp` are the sizes. Ranks are numbered with tp fastest, then
            cp, then dp.
        name: "pp", "dp", "cp" or "tp".
    """
    raise NotAttempted


def axis_ranks(shape: MeshShape, rank: int, name: str) -> tuple[int, ...]:
    """The first of them is `rank` without its steps along the axis; from there it is one stride after another."""
    return _strided(shape, rank, name, ("pp", "dp", "cp", "tp"))


def _strided(shape: MeshShape, rank: int, name: str, order: tuple[str, ...]) -> tuple[int, ...]:
    """The axis' ranks if they are numbered with the last of `order` fastest."""
    size = getattr(shape, name)
    stride = math.prod(getattr(shape, faster) for faster in order[order.index(name) + 1 :]) if name in order else 1
    first = rank - rank // stride % size * stride
    return tuple(first + stride * step for step in range(size))


def _neighbours(shape: MeshShape, rank: int, name: str) -> tuple[int, ...]:
    size = getattr(shape, name)
    return tuple(range(rank // size * size, rank // size * size + size))


_FORMULA = "rank = ((pp_index * dp + dp_index) * cp + cp_index) * tp + tp_index"
_AXES: dict[str, tuple[Answer, str]] = {
    "pp fastest": (
        lambda shape, rank, name: _strided(shape, rank, name, ("tp", "cp", "dp", "pp")),
        f"this numbers the grid with pp fastest; tp is: {_FORMULA}",
    ),
    "without cp": (
        lambda shape, rank, name: _strided(shape, rank, name, ("pp", "dp", "tp")),
        "right where cp is 1: two ranks that differ by one in dp_index are cp * tp apart, and by one in cp_index tp",
    ),
    "cp outside dp": (
        lambda shape, rank, name: _strided(shape, rank, name, ("pp", "cp", "dp", "tp")),
        f"cp lies between dp and tp, and here it was put between pp and dp: {_FORMULA}",
    ),
    "cp outermost": (
        lambda shape, rank, name: _strided(shape, rank, name, ("cp", "pp", "dp", "tp")),
        f"cp lies between dp and tp, and here it is outside of all: {_FORMULA}",
    ),
    "cp fastest": (
        lambda shape, rank, name: _strided(shape, rank, name, ("pp", "dp", "tp", "cp")),
        f"tp is faster than cp: {_FORMULA}",
    ),
    "neighbours": (
        _neighbours,
        "only the tp axis is made of neighbouring ranks; two ranks that differ by one in cp_index are tp apart, by one "
        "in dp_index cp * tp, and by one in pp_index dp * cp * tp",
    ),
    "without itself": (
        lambda shape, rank, name: tuple(r for r in axis_ranks(shape, rank, name) if r != rank),
        "a rank is on its own axis: the group that an all_reduce works on includes it",
    ),
    "starts with itself": (
        lambda shape, rank, name: tuple(sorted(axis_ranks(shape, rank, name), key=lambda r: (r < rank, r))),
        "these are the ranks, and not in order: every rank of an axis must list them alike, by their index on it",
    ),
    "coordinates": (
        lambda shape, rank, name: tuple(range(getattr(shape, name))),
        "these are coordinates along the axis; asked are global ranks",
    ),
}
_SHAPES = [MeshShape(pp, dp, cp, tp) for pp, dp, cp, tp in itertools.product((1, 2), (1, 2, 3), (1, 2), (1, 2))]
_QUESTIONS = [(s, rank, name) for s in _SHAPES for rank in range(s.world_size) for name in AXES]


def _run_axes(answer: Answer) -> str | None:
    got = [tuple(answer(*question)) for question in _QUESTIONS]
    want = [axis_of(*question).ranks for question in _QUESTIONS]
    if got == want:
        return None
    for wrong, hint in _AXES.values():
        if got == [wrong(*question) for question in _QUESTIONS]:
            return hint
    at = next(i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
    shape, rank, name = _QUESTIONS[at]
    where = f"rank {rank} of {shape} has coordinates {coordinates(shape, rank)}"
    return f"{where}; its {name} axis is {want[at]}, not {got[at]}"


# --- tree or ring -----------------------------------------------------------------------------------------


def crossover_stub(ranks: int, latency: float, bandwidth: float) -> float:
    """From how many bytes on is the ring as fast as the tree, in the alpha-beta model? A fraction or a whole number.

    Args:
        ranks: n, a power of two, at least 4. The ring has 2 (n - 1) steps of S/n bytes, the tree 2 log2 n of S.
        latency: seconds of an empty message: alpha.
        bandwidth: bytes a second over one link: 1 / beta.
    """
    raise NotAttempted


def crossover(ranks: int, latency: float, bandwidth: float) -> float:
    """Set both times equal: S/bandwidth (log n - (n-1)/n) = latency (n - 1 - log n)."""
    depth = math.log2(ranks)
    return latency * bandwidth * (ranks - 1 - depth) / (depth - (ranks - 1) / ranks)


def _crossing(ring: tuple[float, float], tree: tuple[float, float], latency: float, bandwidth: float) -> float:
    """Where two sums of (steps, times the tensor) on the critical path cost the same."""
    gap = tree[1] - ring[1]
    return latency * bandwidth * (ring[0] - tree[0]) / gap if gap else math.inf


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
    "natural logarithm": (
        lambda n, latency, bandwidth: _crossing((n - 1, (n - 1) / n), (math.log(n), math.log(n)), latency, bandwidth),
        "the logarithm is the natural one; a tree over n ranks has log2 n levels",
    ),
    "tree goes up only": (
        lambda n, latency, bandwidth: _crossing(
            (2 * (n - 1), 2 * (n - 1) / n), (math.log2(n), math.log2(n)), latency, bandwidth
        ),
        "the tree was counted up to the root only; the sum has to come down again: 2 log2 n steps",
    ),
    "ring goes round once": (
        lambda n, latency, bandwidth: _crossing(
            (n - 1, (n - 1) / n), (2 * math.log2(n), 2 * math.log2(n)), latency, bandwidth
        ),
        "the ring was counted once around; it goes twice, n - 1 steps to add up and n - 1 to hand round",
    ),
    "in numbers": (
        lambda ranks, latency, bandwidth: crossover(ranks, latency, bandwidth) / 4,
        "this is in float32 numbers; asked are bytes",
    ),
}
_LINKS = [(n, latency, bandwidth) for n in (4, 8, 64) for latency in (1e-6, 5e-5) for bandwidth in (1e9, 3e11)]


def _near(got: float, want: float) -> bool:
    """Equal, or the next whole number of bytes above or below."""
    return math.isclose(got, want, rel_tol=1e-6) or (abs(want) > 100 and abs(got - want) < 1)


def _run_crossover(answer: Answer) -> str | None:
    def like(other: Answer) -> bool:
        return all(_near(answer(*link), other(*link)) for link in _LINKS)

    if like(crossover):
        return None
    for wrong, hint in _CROSSOVERS.values():
        if like(wrong):
            return hint
    ranks, latency, bandwidth = next(link for link in _LINKS if not _near(answer(*link), crossover(*link)))
    size = answer(ranks, latency, bandwidth)
    ring, tree = (f(size, ranks, latency, bandwidth) for f in (ring_seconds, tree_seconds))
    return f"at {size:.3g} bytes on {ranks} ranks the ring takes {ring:.3g} s and the tree {tree:.3g} s"


EXERCISES = [
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
