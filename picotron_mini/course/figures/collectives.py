"""Drawings of chapter 00: what each collective does to the ranks' memory, and who stands where in a mesh.

A row is a rank's memory, cut into parts a, b, c, d. The colour says whose numbers they are, the digit too: b2 is part
b of rank 2, and a grey +b is the sum of everyone's part b.
"""

from __future__ import annotations

from typing import Any

from ...config import MeshShape
from ...mesh import Mesh, coordinates
from .picture import GREY, INK, PALE, SUM, Picture, drawing, figure, picture

N = 4  # ranks, and parts
PARTS = "abcd"
Memory = list[list[str]]  # [rank][part]: "b2", "+b" for a sum, "" for nothing

_own = [[f"{part}{rank}" for part in PARTS] for rank in range(N)]
_sum = [f"+{part}" for part in PARTS]
_nothing = [""] * N


def _only(row: list[str], keep: int) -> list[str]:
    return [cell if part == keep else "" for part, cell in enumerate(row)]


# name -> memory before, memory after, and the words
COLLECTIVES: dict[str, tuple[Memory, Memory, str]] = {
    "broadcast": (
        [_own[0], _nothing, _nothing, _nothing],
        [_own[0]] * N,
        "broadcast: before, only rank 0 has its four parts; after, all four ranks have rank 0's parts",
    ),
    "all_reduce": (
        _own,
        [_sum] * N,
        "all-reduce: before, each rank has four parts of its own; after, every rank has the sums of all four parts",
    ),
    "reduce_scatter": (
        _own,
        [_only(_sum, rank) for rank in range(N)],
        "reduce-scatter: before, each rank has four parts of its own; after, rank r has only the sum of part r",
    ),
    "all_gather": (
        [_only(_own[rank], rank) for rank in range(N)],
        [[_own[rank][rank] for rank in range(N)]] * N,
        "all-gather: before, rank r has only part r; after, every rank has all four parts",
    ),
    "all_to_all": (
        _own,
        [[f"{PARTS[rank]}{sender}" for sender in range(N)] for rank in range(N)],
        "all-to-all: before, each rank has four parts of its own; after, rank r has part r of every rank, in order",
    ),
    "send_receive": (
        [_own[0], _nothing, _nothing, _nothing],
        [_own[0], _nothing, _own[0], _nothing],
        "send-receive: before, only rank 0 has its four parts; after, rank 2, which received them, has them too",
    ),
}


def draw_collective(name: str) -> Picture:
    """The memory of four ranks before and after one collective; `name` is a key of `COLLECTIVES`."""
    before, after, words = COLLECTIVES[name]
    with drawing():
        fig = figure(5.6, 1.9)
        left, right = fig.subplots(1, 2)
        _memory(left, before, "before")
        _memory(right, after, "after")
        left.annotate(
            "", (1.22, 0.5), (1.04, 0.5), xycoords="axes fraction", arrowprops={"arrowstyle": "->", "color": GREY}
        )
    return picture(fig, words)


def _memory(axes: Any, memory: Memory, title: str) -> None:
    for rank, row in enumerate(memory):
        axes.text(-0.15, rank + 0.5, f"rank {rank}", ha="right", va="center")
        for part, cell in enumerate(row):
            colour = "none" if not cell else SUM if cell[0] == "+" else PALE[int(cell[1])]
            _box(axes, part, rank, colour, cell)
    _frame(axes, title, N, N)


def _box(axes: Any, x: float, y: float, colour: str, text: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), 0.94, 0.86, facecolor=colour, edgecolor=GREY, linewidth=0.6))
    axes.text(x + 0.47, y + 0.45, text, ha="center", va="center", color=INK)


def _frame(axes: Any, title: str, columns: float, rows: float) -> None:
    axes.set(xlim=(-1.1, columns), ylim=(rows, -0.1), title=title)
    axes.set_axis_off()
    axes.title.set_fontsize(9)


def draw_mesh(shape: MeshShape) -> Picture:
    """The ranks of a mesh as a grid: a panel for each pp index, a row for each dp index, a column for each tp index."""
    said = []
    with drawing():
        fig = figure(1.4 + 1.5 * shape.pp * max(shape.tp, 2) / 2, 0.75 + 0.45 * shape.dp)
        panels = fig.subplots(1, shape.pp, squeeze=False)[0]
        for pp, axes in enumerate(panels):
            for rank in range(shape.world_size):
                at = coordinates(shape, rank)
                if at["pp"] == pp:
                    _box(axes, at["tp"], at["dp"], PALE[at["dp"] % len(PALE)], str(rank))
            for dp in range(shape.dp):
                axes.text(-0.15, dp + 0.45, f"dp={dp}", ha="right", va="center")
            for tp in range(shape.tp):
                axes.text(tp + 0.47, shape.dp + 0.1, f"tp={tp}", ha="center", va="top")
            _frame(axes, f"pp={pp}", shape.tp, shape.dp + 0.5)
    for name in ("tp", "dp", "pp"):
        members = sorted({Mesh(shape, rank)[name].ranks for rank in range(shape.world_size)})
        said.append(f"{name}: " + "; ".join(" and ".join(map(str, ranks)) for ranks in members))
    return picture(fig, f"{shape.world_size} ranks in a grid. Ranks that work together, {'. '.join(said)}")
