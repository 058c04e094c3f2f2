"""Drawings of chapter 02: rows of documents, a batch divided among ranks, and what a resumed run reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ...data.loader import data_rows
from .picture import GREY, INK, LINES, PALE, Picture, drawing, figure, picture

PADDING = -1  # in place of a document's index
Rows = list[list[int]]  # [row][position]: index of the document that the token belongs to


def padded_rows(lengths: Sequence[int], seq_len: int) -> Rows:
    """Each document begins a row of its own; the end of its last row is padding.

    Args:
        lengths: tokens of each document, end token included.
    """
    out: Rows = []
    for document, length in enumerate(lengths):
        for start in range(0, length, seq_len):
            used = min(length - start, seq_len)
            out.append([document] * used + [PADDING] * (seq_len - used))
    return out


def packed_rows(lengths: Sequence[int], seq_len: int) -> Rows:
    """The documents one after the other, cut where a row is full; the last row may be short."""
    stream = [document for document, length in enumerate(lengths) for _ in range(length)]
    return [stream[start : start + seq_len] for start in range(0, len(stream), seq_len)]


def draw_rows(lengths: Sequence[int], seq_len: int) -> Picture:
    """The same documents padded and packed, a colour for each document."""
    ways = {"padded": padded_rows(lengths, seq_len), "packed": packed_rows(lengths, seq_len)}
    most = len(ways["padded"])
    with drawing():
        fig = figure(6.5, 0.5 + 0.16 * most)
        for axes, (name, rows) in zip(fig.subplots(1, 2), ways.items(), strict=True):
            for y, row in enumerate(rows):
                _runs(axes, y, row)
            axes.set(xlim=(-0.5, seq_len + 0.5), ylim=(most, -0.2), title=f"{name}: {len(rows)} rows of {seq_len}")
            axes.title.set_fontsize(9)
            axes.set_axis_off()
    return picture(
        fig,
        f"{len(lengths)} documents in rows of {seq_len} tokens, a colour for each. Padded, each document begins a row "
        f"and the empty ends of {most} rows are hatched. Packed, they follow each other and fill "
        f"{len(ways['packed'])} rows.",
    )


def _runs(axes: Any, y: int, row: Sequence[int]) -> None:
    """One row as a box for each run of tokens of one document."""
    from matplotlib.patches import Rectangle

    starts = [x for x in range(len(row)) if x == 0 or row[x] != row[x - 1]]
    for start, stop in pairwise([*starts, len(row)]):
        padding = row[start] == PADDING
        style: dict[str, Any] = {"facecolor": "none", "hatch": "////"} if padding else {}
        colour = PALE[row[start] % len(PALE)]
        box: dict[str, Any] = {"facecolor": colour, "edgecolor": GREY, "linewidth": 0.5} | style
        axes.add_patch(Rectangle((start, y), stop - start, 0.84, **box))


def draw_shares(rows: Sequence[int], layouts: Sequence[tuple[int, int]]) -> Picture:
    """Which data rank reads which sequence of a batch, and in which micro-batch, for (dp, micro-batches) layouts.

    Args:
        rows: the sequences of the batch, by their row of the text.
    """
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"edgecolor": GREY, "linewidth": 0.6}
    with drawing():
        fig = figure(6.5, 0.5 + 0.36 * len(layouts))
        axes = fig.subplots()
        for y, (dp, micro_batches) in enumerate(layouts):
            axes.text(
                -0.2,
                y + 0.45,
                f"dp={dp}, {micro_batches} micro-batch{'es' * (micro_batches > 1)}",
                ha="right",
                va="center",
            )
            for rank in range(dp):
                for k in range(micro_batches):
                    share = range(len(rows))[data_rows(len(rows), dp, rank, micro_batches, k)]
                    at, colour = (share[0] + 0.03, y), PALE[rank % len(PALE)]
                    axes.add_patch(Rectangle(at, len(share) - 0.06, 0.84, facecolor=colour, **style))
                    for i in share:
                        axes.text(i + 0.5, y + 0.44, str(rows[i]), ha="center", va="center", color=INK)
        axes.set(xlim=(-3.6, len(rows)), ylim=(len(layouts), -0.1))
        axes.set_axis_off()
    return picture(
        fig,
        f"A batch of {len(rows)} sequences as one line for each layout. The line is cut in boxes, a colour for each "
        "data rank and a box for each of its micro-batches; the sequences in the line are the same for all layouts.",
    )


def draw_resumes(read: Mapping[str, Sequence[int]], stops: Sequence[int]) -> Picture:
    """Which batch each step read, for loaders that were stopped and resumed.

    Args:
        read: for each loader, by its name, the number of the batch that each step read.
        stops: steps before which the run was restarted.
    """
    with drawing():
        fig = figure(6.5, 2.4)
        axes = fig.subplots()
        for (name, batches), colour, marker in zip(read.items(), LINES, "os^D", strict=False):
            axes.plot(
                range(len(batches)), batches, marker=marker, linestyle=":", color=colour, markersize=5, label=name
            )
        for stop in stops:
            axes.axvline(stop - 0.5, ymax=0.7, color=GREY, linewidth=0.8)  # below the legend
        axes.set(xlabel="step; a line is a restart", ylabel="batch that was read")
        axes.legend()
    said = "; ".join(f"{name}: {', '.join(map(str, batches))}" for name, batches in read.items())
    return picture(
        fig, f"The batch that each step reads, with restarts before steps {', '.join(map(str, stops))}. {said}"
    )
