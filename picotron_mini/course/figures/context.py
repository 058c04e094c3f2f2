"""Pictures and prices of chapter 06: who computes which pairs of chunks in which step, and what ring and Ulysses send.

The drawings are made from what the library does (`chunks.calls`, `chunks.work`), not beside it. A colour is a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...parallel.chunks import calls, chunks, work
from .picture import GREY, INK, LINES, PALE, Picture, drawing, figure, picture


class Pair(NamedTuple):
    """A chunk of queries that meets a chunk of keys: who computes it, and in which step of the ring."""

    queries: int
    keys: int
    rank: int
    step: int


def ring_pairs(cp: int) -> list[Pair]:
    """Every pair of chunks that a causal ring computes. A chunk and itself count as one pair, and cost half."""
    held = [[part.start for part in chunks(2 * cp, cp, rank)] for rank in range(cp)]  # chunks of one token
    return [
        Pair(held[rank][q], held[(rank - step) % cp][k], rank, step)
        for rank in range(cp)
        for step in range(cp)
        for call in calls(rank, (rank - step) % cp, 1, causal=True)
        for q in range(call.queries.start, call.queries.stop)
        for k in range(call.keys.start, call.keys.stop)
        if not call.causal or k <= q
    ]


def draw_pairs(cp: int) -> Picture:
    """The causal triangle in chunks: a square is a pair of chunks, its colour the rank, its number the step."""
    from matplotlib.patches import Rectangle

    with drawing():
        fig = figure(4.6, 4.2)
        axes = fig.subplots()
        for pair in ring_pairs(cp):
            corner = (pair.keys, pair.queries)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=PALE[pair.rank], edgecolor=GREY, linewidth=0.8))
            axes.text(pair.keys + 0.5, pair.queries + 0.5, str(pair.step), ha="center", va="center", color=INK)
        holder = {part.start: rank for rank in range(cp) for part in chunks(2 * cp, cp, rank)}
        axes.set_yticks([c + 0.5 for c in range(2 * cp)], [f"chunk {c}, rank {holder[c]}" for c in range(2 * cp)])
        axes.set_xticks([c + 0.5 for c in range(2 * cp)], range(2 * cp))
        axes.tick_params(length=0)
        axes.set(xlim=(0, 2 * cp), ylim=(2 * cp, 0), aspect="equal", xlabel="chunk of keys", ylabel="chunk of queries")
    return picture(
        fig,
        f"The lower triangle of {2 * cp} by {2 * cp} chunks. Rank r has the rows r and {2 * cp - 1} - r, a short one "
        f"and a long one that together have {2 * cp + 1} squares. Each square carries the step of the ring in which it "
        "is computed; every rank computes its own three squares in step 0 and two in each other step.",
    )


def draw_work(cp: int, seq_len: int) -> Picture:
    """Work of each rank in units of the mean: one run a rank, and head-tail chunks."""
    ways = {"one run a rank": work(seq_len, cp, zigzag=False), "head-tail chunks": work(seq_len, cp)}
    with drawing():
        fig = figure(6.5, 2.3)
        axes = fig.subplots()
        for n, (name, pairs) in enumerate(ways.items()):
            mean = sum(pairs) / cp
            places = [rank + 0.36 * (n - 0.5) for rank in range(cp)]
            axes.bar(places, [each / mean for each in pairs], 0.34, color=LINES[n], label=name)
        axes.axhline(1, color=GREY, linestyle=":", linewidth=0.8)
        axes.set_xticks(range(cp), [f"rank {rank}" for rank in range(cp)])
        axes.set_ylabel("work, of the mean")
        axes.legend(loc="upper left")
    runs = ", ".join(f"{each * cp / sum(ways['one run a rank']):.2f}" for each in ways["one run a rank"])
    return picture(
        fig,
        f"Bars of the work of {cp} ranks, in units of the mean. With one run of the sequence a rank: {runs}. With "
        "head-tail chunks all bars have height 1.",
    )


def layer_bytes(how: str, cp: int, queries: int, keys: int, itemsize: int) -> int:
    """Payload of one layer and micro-batch, forward and backward, on one rank, without masked documents.

    Args:
        how: "ring" or "ulysses".
        queries, keys: numbers in this rank's q, B t H Dh, and in its k, B t Hkv Dh.
        itemsize: bytes of a number; gradients travel round the ring in 4 at least.
    """
    if how == "ring":
        return 2 * keys * (2 * (cp - 1) * itemsize + cp * max(itemsize, 4))
    return 4 * (queries + keys) * itemsize


def border(cp: int, itemsize: int) -> float:
    """The share of key-value heads, Hkv / H, below which the ring sends less than Ulysses, in payload."""
    per_share = layer_bytes("ring", cp, 1, 1, itemsize) - layer_bytes("ulysses", cp, 0, 1, itemsize)
    return layer_bytes("ulysses", cp, 1, 0, itemsize) / per_share


def draw_bytes(heads: int, kv_heads: Sequence[int], sizes: Sequence[int], itemsize: int = 2) -> Picture:
    """Payload of ring and Ulysses for a fixed sequence, against cp; one panel for each number of key-value heads.

    The unit is the bytes of the whole sequence's queries. Ulysses is drawn only where it is legal.
    """
    said = []
    with drawing():
        fig = figure(6.8, 2.6)
        for axes, kv in zip(fig.subplots(1, len(kv_heads), sharey=True, squeeze=False)[0], kv_heads, strict=True):
            for n, how in enumerate(("ring", "ulysses")):
                legal = [cp for cp in sizes if how == "ring" or kv % cp == 0]
                cost = [layer_bytes(how, cp, heads, kv, itemsize) / (cp * heads * itemsize) for cp in legal]
                axes.plot(legal, cost, "o-", color=LINES[n], markersize=4, label=how)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
            axes.set(xlabel="cp", ylim=(0, None))
            axes.set_title(f"{kv} of {heads} heads have keys", loc="left", fontsize=9)
            wins = [cp for cp in sizes if kv % cp or border(cp, itemsize) > kv / heads]
            said.append(f"{kv} key-value heads: the ring sends less or Ulysses is refused at cp={wins or 'none'}")
        fig.axes[0].set_ylabel("payload, of all queries")
        fig.axes[0].legend()
    return picture(
        fig,
        f"Payload against cp, {heads} query heads. The ring's line rises a little, Ulysses' falls as 1/cp and ends "
        "where cp exceeds the key-value heads. " + "; ".join(said) + ".",
    )
