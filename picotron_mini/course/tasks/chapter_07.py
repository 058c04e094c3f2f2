"""Exercises of chapter 07, several axes at once: what crosses between hosts, and over which axes a gradient is summed.

Both are decided without ranks: the first by `mesh.axis_of` and `mesh.data_axis_of`, rank by rank; the second by
`layout_of`, which `verify` holds to one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

from ...config import AXES, MeshShape, RunConfig
from ...legality import resolve
from ...mesh import Mesh
from ...parallel.parallelize import layout_of
from ..exercises import Exercise, Mistake, NotAttempted
from ..figures.layout import bytes_between_hosts
from ..museum import MODEL, TRAIN

Answer = Callable[..., Any]
Sent = Mapping[tuple[str, str], int]


# --- 1: what crosses between hosts ------------------------------------------------------------------------


def across_stub(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    """How many of a rank's bytes belong to axes that have ranks on more than one host.

    Args:
        shape: `shape.pp`, `shape.dp`, `shape.cp`, `shape.tp`; ranks are numbered with tp fastest, then cp, dp, pp.
            All sizes are powers of two.
        ranks_per_host: hosts are filled rank by rank.
        sent: bytes by (axis, operation). An axis is "pp", "dp", "cp" or "tp"; "dp_cp", the ranks that differ in dp or
            cp; or "world", all ranks.
    """
    raise NotAttempted


def across(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    """A group spans the product of its own axis and of all faster ones; if that is more than a host, it crosses."""
    span = {"tp": shape.tp, "cp": shape.cp * shape.tp, "dp": shape.dp * shape.cp * shape.tp}
    span |= {"dp_cp": span["dp"], "pp": shape.world_size, "world": shape.world_size}
    return sum(n for (axis, _), n in sent.items() if span[axis] > ranks_per_host and _size(shape, axis) > 1)


def _size(shape: MeshShape, axis: str) -> int:
    sizes = {axis: getattr(shape, axis) for axis in AXES}
    return {**sizes, "dp_cp": shape.dp * shape.cp, "world": shape.world_size}[axis]


def _own_size_only(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    return sum(n for (axis, _), n in sent.items() if _size(shape, axis) > ranks_per_host)


def _without_made_axes(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    return across(shape, ranks_per_host, {key: n for key, n in sent.items() if key[0] in AXES})


def _dp_inside_cp(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    return bytes_between_hosts(sent, shape, ranks_per_host, ("pp", "cp", "dp", "tp"))


def _group_fills_host(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    return across(shape, ranks_per_host - 1, sent)


def _from_neighbour_to_neighbour(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    apart = {"tp": 1, "cp": shape.tp, "dp": shape.cp * shape.tp, "pp": shape.dp * shape.cp * shape.tp}
    apart |= {"dp_cp": shape.tp, "world": 1}
    return sum(n for (axis, _), n in sent.items() if apart[axis] >= ranks_per_host)


def _of_all_ranks(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    return shape.world_size * across(shape, ranks_per_host, sent)


def _without_stages(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    return across(shape, ranks_per_host, {key: n for key, n in sent.items() if key[0] != "pp"})


def _world_always(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    inside = 0 if shape.world_size > ranks_per_host else sum(n for (axis, _), n in sent.items() if axis == "world")
    return across(shape, ranks_per_host, sent) + inside


_GROUPS = {
    "tp": "tp ranks in a row",
    "cp": "cp * tp ranks from its first to its last",
    "dp": "dp * cp * tp ranks from its first to its last",
    "dp_cp": "dp * cp * tp ranks, all that differ in dp or cp",
    "pp": "the whole mesh, since pp is slowest",
    "world": "all ranks",
}
_NO_SUM = (
    "this is no sum of the bytes that were given: each entry of `sent` is counted once and whole, or not at all, as "
    "it is one rank's bytes already and all groups of an axis lie alike"
)


def _misjudged(axis: str, missing: bool, shape: MeshShape, ranks_per_host: int) -> str:
    """What to tell of an axis that crosses hosts and was not counted, or the other way round, with a mesh to try."""
    wrong = "is left out where it crosses hosts" if missing else "is counted where it stays inside hosts"
    where = f"on {shape} with {ranks_per_host} ranks a host"
    return f"{axis} {wrong}, as {where}: a group of it spans {_GROUPS[axis]}, and crosses if a host has fewer"


_ACROSS: dict[str, tuple[Answer, str]] = {
    "own size": (
        _own_size_only,
        "a group of 2 can lie on two hosts: its ranks are as far apart as all faster axes together are large",
    ),
    "tp slowest": (
        lambda shape, per_host, sent: bytes_between_hosts(sent, shape, per_host, ("tp", "cp", "dp", "pp")),
        "this numbers ranks with pp fastest; here tp is fastest, and pp slowest",
    ),
    "cp outside dp": (
        _dp_inside_cp,
        "cp lies between tp and dp: neighbours along dp are cp * tp ranks apart",
    ),
    "made axes forgotten": (
        _without_made_axes,
        "dp_cp and world are axes too: the first spans dp * cp * tp ranks, the second all",
    ),
    "everything": (
        lambda shape, per_host, sent: sum(sent.values()) if shape.world_size > per_host else 0,
        "an axis whose groups each lie inside one host sends nothing between hosts, however many hosts there are",
    ),
    "a full host": (
        _group_fills_host,
        "a group that spans just as many ranks as a host has fills the host, and crosses nothing",
    ),
    "neighbours": (
        _from_neighbour_to_neighbour,
        "this is how far apart neighbours are; a group crosses if its last rank is on another host than its first, and "
        "between them lie all its ranks",
    ),
    "of all ranks": (_of_all_ranks, _NO_SUM),
    "stages forgotten": (_without_stages, _misjudged("pp", True, MeshShape(2, 1, 1, 2), 2)),
    "world always": (_world_always, _misjudged("world", False, MeshShape(1, 1, 1, 2), 2)),
}
_SHAPES = [
    (MeshShape(pp, dp, cp, tp), per_host)
    for pp in (1, 2)
    for dp in (1, 2, 4)
    for cp in (1, 2)
    for tp in (1, 2, 4)
    for per_host in (2, 4, 8)
]


def _example(shape: MeshShape) -> dict[tuple[str, str], int]:
    """Different numbers for each axis that there is, so that a sum tells which were added."""
    numbers = {"tp": 1, "cp": 10, "dp": 100, "dp_cp": 1000, "pp": 10_000, "world": 100_000}
    there = [axis for axis in numbers if _size(shape, axis) > 1 and (axis != "dp_cp" or shape.cp > 1)]
    return {(axis, "all_reduce"): numbers[axis] for axis in there}


def _counted(shape: MeshShape, ranks_per_host: int, sent: Sent) -> int:
    """By asking the mesh, for every rank."""

    def is_across(axis: str) -> bool:
        everyone = (Mesh(shape, rank)[axis].ranks for rank in range(shape.world_size))
        return any(len({rank // ranks_per_host for rank in ranks}) > 1 for ranks in everyone)

    return sum(n for (axis, _), n in sent.items() if is_across(axis))


def _run_across(answer: Answer) -> str | None:
    def ask(fn: Answer) -> list[int]:
        return [fn(shape, per_host, _example(shape)) for shape, per_host in _SHAPES]

    got, want = ask(answer), ask(_counted)
    if got == want:
        return None
    for wrong, hint in _ACROSS.values():
        if got == ask(wrong):
            return hint
    return _read_across(got, want)


def _read_across(got: list[Any], want: list[int]) -> str:
    """Which axis was counted where it should not be, or not counted where it should."""
    sums = [_axes_in(said, _example(shape)) for (shape, _), said in zip(_SHAPES, got, strict=True)]
    rights = [_axes_in(right, _example(shape)) for (shape, _), right in zip(_SHAPES, want, strict=True)]
    for axis in _GROUPS:
        for case, counted, wanted in zip(_SHAPES, sums, rights, strict=True):
            if counted is None or wanted is None:
                return _NO_SUM
            if (axis in counted) != (axis in wanted):
                return _misjudged(axis, axis in wanted, *case)
    return _NO_SUM


def _axes_in(total: Any, sent: Sent) -> set[str] | None:
    """The axes whose bytes make this total, if any do: of the example no two sums are alike."""
    for number in range(len(sent) + 1):
        for keys in combinations(sent, number):
            if total == sum(sent[key] for key in keys):
                return {axis for axis, _ in keys}
    return None


# --- 2: over which axes a gradient is summed --------------------------------------------------------------


def summed_stub(kind: str, shape: MeshShape, sequence_parallel: bool) -> set[str]:
    """The axes over which a parameter's gradient must be added up, so that every copy of it gets the whole.

    Args:
        kind: "matrix" (a weight that tensor parallelism cuts), "norm" (held whole by every tensor-parallel rank), or
            "tied" (the embedding that is the output head too, cut over the vocabulary).
        shape: sizes of the axes. Name only axes that are larger than 1.
        sequence_parallel: whether a tensor-parallel rank sees its own tokens only at the norms.
    """
    raise NotAttempted


def summed(kind: str, shape: MeshShape, sequence_parallel: bool) -> set[str]:
    """An axis is in it if ranks along it hold the same numbers, and each computed a part of their gradient."""
    axes = {"dp", "cp"}
    if kind == "norm" and sequence_parallel:
        axes.add("tp")
    if kind == "tied":
        axes.add("pp")
    return {axis for axis in axes if getattr(shape, axis) > 1}


def _larger(shape: MeshShape) -> set[str]:
    return {axis for axis in AXES if getattr(shape, axis) > 1}


_NAMES = 'return a set of axes of the mesh, as {"dp", "cp"}; there are pp, dp, cp and tp'
_ONES = "the axes are right; name only those that are larger than 1: along an axis of one rank nothing is summed"
_NO_DP = "ranks along dp hold the same weights and saw other sequences: every gradient is summed over dp, a norm's too"
_NO_CP = "ranks along cp hold the same weights and saw other tokens, as ranks along dp do"
_NO_TOKENS = "with sequence parallelism each tensor-parallel rank computes a norm's gradient from its own tokens"
_NORMS = (
    "without sequence parallelism every tensor-parallel rank sees all tokens at the norms and has the whole gradient "
    "already; a sum would multiply it by tp"
)
_SLICES = "tensor-parallel ranks hold different slices of a cut weight: there is nothing to add"
_NO_TIE = "a tied weight is on the first stage and on the last, and each has a part of its gradient"
_STAGES = "stages hold different layers; only what lies on two of them is summed over pp"

_SUMMED: dict[str, tuple[Answer, str]] = {
    "sizes of one named": (lambda kind, shape, between: summed(kind, MeshShape(2, 2, 2, 2), between), _ONES),
    "both data axes as one": (
        lambda kind, shape, between: {axis.replace("cp", "dp_cp") for axis in summed(kind, shape, between)},
        _NAMES,
    ),
    "a string": (lambda kind, shape, between: ",".join(sorted(summed(kind, shape, between))), _NAMES),
    "tokens in place of dp": (
        lambda kind, shape, between: summed(kind, shape, between) - ({"dp"} if kind == "norm" and between else set()),
        _NO_DP,
    ),
    "cp forgotten": (lambda kind, shape, between: summed(kind, replace(shape, cp=1), between), _NO_CP),
    "tokens forgotten": (lambda kind, shape, between: summed(kind, shape, False), _NO_TOKENS),
    "norms over tp": (lambda kind, shape, between: summed(kind, shape, True), _NORMS),
    "tie forgotten": (lambda kind, shape, between: summed(kind, replace(shape, pp=1), between), _NO_TIE),
    "slices added": (
        lambda kind, shape, between: (
            summed(kind, shape, between) | ({"tp"} & _larger(shape) if kind != "norm" else set())
        ),
        _SLICES,
    ),
    "stages added": (lambda kind, shape, between: summed(kind, shape, between) | ({"pp"} & _larger(shape)), _STAGES),
}
_KINDS = {"matrix": "layers.0.mlp.up.weight", "norm": "layers.0.mlp_norm.weight", "tied": "embed.weight"}
_MESHES = [MeshShape(pp, dp, cp, tp) for pp in (1, 2) for dp in (1, 2) for cp in (1, 2) for tp in (1, 2)]


def _why(kind: str, axis: str, missing: bool) -> str:
    """What is wrong with an axis that is missing, or too much. Over dp and cp every gradient is summed."""
    if missing:
        return {"dp": _NO_DP, "cp": _NO_CP, "tp": _NO_TOKENS, "pp": _NO_TIE}[axis]
    return _STAGES if axis == "pp" else _NORMS if kind == "norm" else _SLICES


def _read_axes(said: Any) -> frozenset[str] | None:
    """The axes that an answer names, read once, as it may be a generator; None if it is something else."""
    if isinstance(said, str) or not isinstance(said, Iterable):
        return None
    names = list(said)
    return frozenset(names) if all(name in AXES for name in names) else None


def _run_summed(answer: Answer) -> str | None:
    cases = [(k, shape, between) for k in _KINDS for shape in _MESHES for between in (False, True)]

    def says(kind: str, shape: MeshShape, between: bool) -> set[str]:
        run = resolve(RunConfig(layout=str(shape), model=MODEL, train=replace(TRAIN, sequence_parallel=between)))
        return _larger(shape) & set(layout_of(run)[_KINDS[kind]].sum_axes)

    got = []
    for case in cases:
        names = _read_axes(answer(*case))
        if names is None:
            return _NAMES
        got.append(names)
    for axis in ("dp", "cp", "tp", "pp"):
        for (kind, shape, between), names in zip(cases, got, strict=True):
            want = says(kind, shape, between)
            if axis in _larger(shape) and (axis in names) != (axis in want):
                return _why(kind, axis, missing=axis in want)
    return None if all(names <= _larger(shape) for (_, shape, _), names in zip(cases, got, strict=True)) else _ONES


EXERCISES = [
    Exercise(
        id="07.across",
        title="What crosses between hosts",
        task="Given the mesh, the ranks of a host and the bytes by axis, add up those of axes that cross hosts.",
        stub=across_stub,
        reference=across,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _ACROSS.items()),
        run=_run_across,
    ),
    Exercise(
        id="07.summed",
        title="Who holds a part of this gradient",
        task="Name the axes over which the gradient of a matrix, a norm and a tied embedding is summed.",
        stub=summed_stub,
        reference=summed,
        mistakes=tuple(Mistake(name, wrong, hint) for name, (wrong, hint) in _SUMMED.items()),
        run=_run_summed,
    ),
]
