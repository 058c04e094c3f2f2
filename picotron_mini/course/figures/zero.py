"""Drawings of ZeRO: what a rank keeps in each stage, and how the weights of ZeRO 3 come and go.

The second is no timeline: it shows the order in which a rank's program starts and ends things, which is the same on
every machine. How long each of them takes is the machine's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ...mesh import Axis
from ...parallel.footprint import Footprint
from ...parallel.zero3 import ShardedWeights, _Unit
from .picture import GREY, INK, PALE, Picture, drawing, figure, picture

COLOURS = {"on its way": PALE[3], "here": PALE[0], "gradient": PALE[1]}


class Passage(NamedTuple):
    """Something that happens to a unit: it sets out ("fetch"), is "here", is "freed", its gradient goes ("reduce")."""

    what: str
    unit: int


class Watched(ShardedWeights):
    """`ShardedWeights` that notes in `passages` what happens to its units, in the order of the program."""

    def __init__(self, modules: Sequence[nn.Module], axis: Axis) -> None:
        self.passages: list[Passage] = []
        super().__init__(modules, axis)
        self.passages.clear()  # of what the construction did
        start = self.gradients.start_of

        def start_of(parameters: Any) -> None:
            found = list(parameters)
            unit = next(u for u in self.units for cuts, _ in u.buffers for c in cuts if c.parameter is found[0])
            self._note("reduce", unit)
            start(found)

        self.gradients.start_of = start_of  # type: ignore[method-assign]

    def _note(self, what: str, unit: _Unit) -> None:
        if unit in self.units:
            self.passages.append(Passage(what, self.units.index(unit)))

    def _fetch(self, unit: _Unit) -> None:
        if not unit.here and not unit.travelling:
            self._note("fetch", unit)
        super()._fetch(unit)

    def _need(self, unit: _Unit) -> None:
        was = unit.here
        super()._need(unit)
        if not was:
            self._note("here", unit)

    def _free(self, unit: _Unit) -> None:
        if unit.here:
            self._note("freed", unit)
        super()._free(unit)


def spans(passages: Sequence[Passage]) -> list[tuple[str, int, int, int]]:
    """(what, unit, first step, end) for each time that a unit was on its way or here, and for each reduction."""
    out: list[tuple[str, int, int, int]] = []
    since: dict[int, int] = {}
    for step, (what, unit) in enumerate(passages):
        if what == "reduce":
            out.append(("gradient", unit, step, step + 1))
            continue
        if what in ("here", "freed"):
            out.append(("on its way" if what == "here" else "here", unit, since.pop(unit), step))
        if what in ("fetch", "here"):
            since[unit] = step
    return out


def most_at_once(passages: Sequence[Passage]) -> int:
    """The largest number of units that are whole, or on their way to be, at one moment."""
    found = spans(passages)
    inside = [sum(a <= step < b for what, _, a, b in found if what != "gradient") for step in range(len(passages))]
    return max(inside)


def draw_passages(passages: Sequence[Passage], names: Sequence[str], words: str) -> Picture:
    """A row for each unit: when its weights are on their way, when they are here, when its gradient sets out."""
    from matplotlib.patches import Patch

    with drawing():
        fig = figure(6.5, 0.7 + 0.32 * len(names))
        axes = fig.subplots()
        for what, unit, start, end in spans(passages):
            axes.broken_barh([(start, end - start)], (unit + 0.1, 0.8), color=COLOURS[what], edgecolor=GREY, lw=0.5)
        frees = [step for step, (what, unit) in enumerate(passages) if what == "freed" and unit == len(names) - 1]
        axes.axvline(frees[0] + 0.5, color=GREY, linestyle=":")
        for text, at in (("forward", frees[0] / 2), ("backward", (frees[0] + len(passages)) / 2)):
            axes.text(at, -0.15, text, ha="center", va="bottom")
        axes.set_yticks([n + 0.5 for n in range(len(names))], names)
        axes.set(ylim=(len(names), -0.1), xlim=(0, len(passages)), xticks=[])
        axes.set_xlabel("order of the program on one rank")
        axes.legend(
            handles=[Patch(facecolor=colour, edgecolor=GREY, label=label) for label, colour in zip(
                ("weights on their way", "weights here: it computes", "gradient to its owners"), COLOURS.values(),
                strict=True,
            )],
            loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8,
        )  # fmt: skip
    return picture(fig, words)


def draw_states(predicted: Mapping[str, Footprint], measured: Mapping[str, float], parameters: int) -> Picture:
    """Bytes a parameter that a rank keeps, a bar for each entry, cut by kind; a dot where it was measured.

    Args:
        measured: bytes, for some of the same names.
    """
    kinds = {"weights": "weights", "gradients": "gradients", "masters": "masters", "optimizer": "moments of AdamW"}
    with drawing():
        fig = figure(6.5, 0.9 + 0.36 * len(predicted))
        axes = fig.subplots()
        left = [0.0] * len(predicted)
        for (kind, label), colour in zip(kinds.items(), PALE, strict=False):
            width = [getattr(each, kind) / parameters for each in predicted.values()]
            axes.barh(range(len(width)), width, 0.7, left, color=colour, edgecolor=GREY, linewidth=0.5, label=label)
            left = [a + b for a, b in zip(left, width, strict=True)]
        for row, (name, total) in enumerate(zip(predicted, left, strict=True)):
            axes.text(total + 0.25, row, f"{total:.2f}", va="center")
            if name in measured:
                axes.plot(measured[name] / parameters, row, "o", color=INK, markeredgecolor=GREY, markersize=5)
        axes.set_yticks(range(len(predicted)), predicted)
        axes.invert_yaxis()
        axes.set(xlabel="bytes a parameter on one rank; a dot is measured", xlim=(0, 20))
        axes.legend(fontsize=8, loc="lower right")
    said = "; ".join(f"{name}: {total:.2f}" for name, total in zip(predicted, left, strict=True))
    return picture(fig, f"Bars of the bytes that a rank keeps for each parameter, cut by what they are for. {said}.")
