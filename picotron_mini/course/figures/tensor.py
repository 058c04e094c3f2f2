"""Drawings of chapter 04: two weights cut so that their product needs one sum, and which heads a rank gets.

A colour is a rank, as in every drawing of this course; what all ranks hold whole is grey.
"""

from __future__ import annotations

from typing import Any

from .picture import GREY, INK, PALE, SUM, Picture, drawing, figure, picture

T, D, F = 1.5, 1.5, 2.8  # how long tokens, width and inner width are drawn


def draw_pair() -> Picture:
    """A column parallel and a row parallel product, as block matrices of two ranks."""
    two = PALE[:2]
    with drawing():
        fig = figure(6.6, 4.4)
        axes = fig.subplots()
        axes.text(0, -0.75, "column parallel: the first weight is cut by its outputs", color=GREY)
        _blocks(axes, 0, 0.3, D, T, (("x", SUM),), "D", "T")
        _sign(axes, 2.1, 1.05, "·")
        _blocks(axes, 2.7, 0.3, F, D, (("$A_1$", two[0]), ("$A_2$", two[1])), "F", "D")
        _sign(axes, 6.0, 1.05, "=")
        _blocks(axes, 6.5, 0.3, F, T, (("$x A_1$", two[0]), ("$x A_2$", two[1])), "F", "T")

        axes.text(0, 2.75, "row parallel: the second is cut by its inputs", color=GREY)
        _blocks(axes, 0, 4.0, F, T, (("$h_1$", two[0]), ("$h_2$", two[1])), "F", "T")
        _sign(axes, 3.2, 4.75, "·")
        _blocks(axes, 3.9, 3.7, D, F, (("$B_1$", two[0]), ("$B_2$", two[1])), "D", "F", down=True)
        _sign(axes, 5.85, 4.75, "=")
        _blocks(axes, 6.5, 4.0, D, T, (("$h_1 B_1$", two[0]),), "D", "T")
        _sign(axes, 8.4, 4.75, "+")
        _blocks(axes, 8.9, 4.0, D, T, (("$h_2 B_2$", two[1]),), "D", "")
        _sign(axes, 10.8, 4.75, "=")
        _blocks(axes, 11.2, 4.0, D, T, (("y", SUM),), "D", "")
        axes.text(8.65, 6.1, "all_reduce", color=GREY, ha="center")
        axes.set(xlim=(-0.5, 12.9), ylim=(6.6, -1.1), aspect="equal")
        axes.set_axis_off()
    return picture(
        fig,
        "Block matrices of two ranks. Above: x, whole on both ranks, times a first weight cut into two column blocks, "
        "one a rank, gives a result in two column blocks. Below: that result times a second weight cut into two row "
        "blocks gives one whole-sized term on each rank, and an all_reduce adds the two into y.",
    )


def _blocks(
    axes: Any,
    x: float,
    y: float,
    width: float,
    height: float,
    parts: tuple[tuple[str, str], ...],
    across: str,
    along: str,
    down: bool = False,
) -> None:
    """One matrix with its corner at (x, y), cut into equal parts from left to right, or from the top down."""
    from matplotlib.patches import Rectangle

    n = len(parts)
    for i, (text, colour) in enumerate(parts):
        w, h = (width, height / n) if down else (width / n, height)
        left, top = (x, y + i * h) if down else (x + i * w, y)
        axes.add_patch(Rectangle((left, top), w, h, facecolor=colour, edgecolor=GREY, linewidth=0.8))
        axes.text(left + w / 2, top + h / 2, text, ha="center", va="center", color=INK)
    axes.text(x + width / 2, y - 0.08, across, ha="center", va="bottom", fontsize=7)
    axes.text(x - 0.1, y + height / 2, along, ha="right", va="center", fontsize=7)


def _sign(axes: Any, x: float, y: float, sign: str) -> None:
    axes.text(x, y, sign, ha="center", va="center", fontsize=12)


def ranks_of_heads(heads: int, kv_heads: int, tp: int) -> tuple[list[int], list[list[int]]]:
    """Which rank computes each query head, and which ranks need each key-value head, if query heads are cut evenly.

    Returns:
        For each of the query heads its rank; for each key-value head its ranks, more than one where it cannot be cut.
    """
    queries = [head * tp // heads for head in range(heads)]
    group = heads // kv_heads
    return queries, [sorted(set(queries[g * group : (g + 1) * group])) for g in range(kv_heads)]


def draw_heads(heads: int, kv_heads: int, sizes: tuple[int, ...]) -> Picture:
    """Query heads above the key-value heads that they share, coloured by rank, one panel for each size of tp."""
    from matplotlib.patches import Rectangle

    said = []
    with drawing():
        fig = figure(6.4, 1.25 * len(sizes) + 0.1)
        for axes, tp in zip(fig.subplots(len(sizes), squeeze=False)[:, 0], sizes, strict=True):
            queries, keys = ranks_of_heads(heads, kv_heads, tp)
            group = heads // kv_heads
            for head, rank in enumerate(queries):
                axes.add_patch(Rectangle((head, 0), 0.92, 0.8, facecolor=PALE[rank], edgecolor=GREY, linewidth=0.8))
                axes.text(head + 0.46, 0.42, f"q{head}", ha="center", va="center", color=INK)
            for head, needed in enumerate(keys):
                width = (group - 0.08) / len(needed)
                for i, rank in enumerate(needed):
                    left = head * group + i * width
                    axes.add_patch(Rectangle((left, 1), width, 0.8, facecolor=PALE[rank], edgecolor=GREY))
                axes.text(head * group + group / 2, 1.42, f"k{head}, v{head}", ha="center", va="center", color=INK)
            shared = [head for head, needed in enumerate(keys) if len(needed) > 1]
            verdict = (
                f"refused: {len(keys[shared[0]])} ranks need k{shared[0]}" if shared else "each rank has whole groups"
            )
            axes.set_title(f"tp={tp}: {verdict}", loc="left", fontsize=9)
            axes.set(xlim=(-0.1, heads), ylim=(1.9, -0.1))
            axes.set_axis_off()
            said.append(f"with tp={tp}, {verdict}")
    return picture(
        fig,
        f"{heads} query heads in a row above the {kv_heads} key-value heads that they share, coloured by rank: "
        + "; ".join(said),
    )
