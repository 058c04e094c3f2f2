"""Pictures of chapter 08: the expert that each character goes to, the load over time, and who sends rows to whom.

A colour is an expert in the first two and a rank in the third. Nothing here computes a route or a count; the pictures
are of what a run decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .picture import GREY, INK, PALE, Picture, drawing, figure, picture


def draw_routes(lines: Sequence[tuple[str, Sequence[int]]]) -> Picture:
    """Text in boxes, a character a box, coloured by the expert that it is sent to; the number is the expert's.

    Args:
        lines: a text and the expert of each of its characters.
    """
    from matplotlib.patches import Rectangle

    width = max(len(text) for text, _ in lines)
    with drawing():
        fig = figure(7.2, 0.62 * len(lines))
        axes = fig.subplots()
        for row, (text, experts) in enumerate(lines):
            for place, (character, expert) in enumerate(zip(text, experts, strict=True)):
                axes.add_patch(Rectangle((place, row), 1, 0.86, facecolor=PALE[expert % len(PALE)], edgecolor="none"))
                shown = "␣" if character == " " else character
                axes.text(place + 0.5, row + 0.28, shown, ha="center", va="center", color=INK, fontsize=9)
                axes.text(place + 0.5, row + 0.66, str(expert), ha="center", va="center", color=INK, fontsize=6)
        axes.set(xlim=(0, width), ylim=(len(lines), -0.05))
        axes.set_axis_off()
    said = []
    for text, experts in lines:
        most = max(set(experts), key=list(experts).count)
        said.append(f"of {text!r} most, {list(experts).count(most)} of {len(text)} characters, go to expert {most}")
    return picture(fig, "Characters in boxes, coloured by expert, with its number: " + "; ".join(said) + ".")


def draw_load(loads: Mapping[str, Tensor], window: int = 5) -> Picture:
    """The share of each expert over the steps, one panel a run: bands stacked to 1, an expert a band.

    Args:
        loads: of each run [steps, E].
        window: steps that are averaged.
    """
    said = []
    with drawing():
        fig = figure(7.2, 2.1)
        for axes, (name, load) in zip(
            fig.subplots(1, len(loads), sharey=True, squeeze=False)[0], loads.items(), strict=True
        ):
            steps, experts = load.shape
            smooth = load[: steps // window * window].unflatten(0, (-1, window)).mean(1)  # [steps / window, E]
            at = [window * (n + 0.5) for n in range(len(smooth))]
            axes.stackplot(at, *smooth.T.tolist(), colors=PALE[:experts], edgecolor=GREY, linewidth=0.3)
            axes.set_title(name, loc="left", fontsize=9)
            axes.set(xlabel="step", ylim=(0, 1), xlim=(0, steps))
            late = load[-20:].mean(0)
            said.append(
                f"{name}: at the end the widest band has {late.max():.2f} of the rows, the narrowest {late.min():.3f}"
            )
        fig.axes[0].set_ylabel("share of the rows")
    return picture(fig, "Bands, one an expert, stacked to 1, against the step. " + "; ".join(said) + ".")


def draw_trade(rows: Tensor, title: str = "") -> Picture:
    """Who sends how many rows to whom: a square of numbers, with the sums of what arrives below.

    Args:
        rows: [ranks, ranks] int64, from a rank (the row) to a rank (the column).
    """
    from matplotlib.patches import Rectangle

    ranks, most = len(rows), max(int(rows.max()), 1)
    with drawing():
        fig = figure(3.6, 2.9)
        axes = fig.subplots()
        for source in range(ranks):
            for to in range(ranks):
                number = int(rows[source, to])
                if number:  # the area is the number, but that it has room for its digits
                    side = max(0.3, 0.94 * (number / most) ** 0.5)
                    corner = (to + 0.5 - side / 2, source + 0.5 - side / 2)
                    axes.add_patch(Rectangle(corner, side, side, facecolor=PALE[to], edgecolor=GREY, linewidth=0.6))
                colour = INK if number else GREY
                axes.text(to + 0.5, source + 0.5, str(number), ha="center", va="center", color=colour)
        for to in range(ranks):
            axes.text(to + 0.5, ranks + 0.32, f"{int(rows[:, to].sum())} in all", ha="center", va="center", fontsize=8)
        axes.set_yticks([r + 0.5 for r in range(ranks)], [f"from rank {r}" for r in range(ranks)])
        axes.set_xticks([r + 0.5 for r in range(ranks)], [f"to {r}" for r in range(ranks)])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set(xlim=(0, ranks), ylim=(ranks + 0.6, 0), aspect="equal")
        for spine in axes.spines.values():
            spine.set_visible(False)
        if title:
            axes.set_title(title, loc="left", fontsize=9)
    arrive = ", ".join(f"{int(rows[:, to].sum())}" for to in range(ranks))
    return picture(
        fig,
        f"A table of squares, a row for each rank that sends, a column for each that receives: {rows.tolist()}. "
        f"In all {arrive} rows arrive at the ranks.",
    )
