"""Line plots as inline SVG, drawn without a library.

A plot has no viewBox, so it does not scale like a photograph: it is as wide as its column, and its text stays
12 px on a phone. Positions are percentages of the plot area. Only the curves live in an inner <svg> that is
stretched; `vector-effect` keeps their strokes from being stretched with it. Colours come from the style sheet,
so the same picture is right in light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from picotron_mini.monitoring.page import escape
from picotron_mini.monitoring.units import count_text, number_text

MOST_POINTS = 1200  # of one curve; beyond that the smallest and largest of each bin are kept


@dataclass(frozen=True)
class Series:
    """One curve: `style` is a class of the style sheet (raw, main, second); `dots` marks every point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]  # gaps where a value is not finite
    style: str = "main"
    dots: bool = False


def line_plot(
    title: str,
    series: Sequence[Series],
    *,
    guides: Sequence[tuple[str, float]] = (),
    log: bool = False,
    from_zero: bool = False,
    height: int = 160,
) -> str:
    """Draw series against the step.

    Args:
        title: what a screen reader says; the visible heading is the caller's.
        guides: dashed horizontal lines, as (label, y).
        log: a logarithmic y axis; values that are not positive are left out.
        from_zero: let the y axis begin at 0.
        height: of the plot area in pixels.
    """
    curves = [(s, _thin([(x, y) for x, y in zip(s.x, s.y, strict=True) if not log or not y <= 0])) for s in series]
    points = [(x, y) for _, curve in curves for x, y in curve if math.isfinite(y)]
    if not points:
        return '<p class="quiet">Nothing to draw: no step has a finite value.</p>'
    ys = [y for _, y in points] + [y for _, y in guides]
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    scale = math.log if log else float
    low, high, marks = _axis(low, high, log)

    def across(x: float) -> float:
        return 100 * (x - left) / (right - left) if right > left else 50.0

    def down(y: float) -> float:
        return 100 * (scale(high) - scale(y)) / (scale(high) - scale(low)) if high > low else 50.0

    said = escape(title)
    out = [f'<div class="chart"><svg role="img" height="{height}" aria-label="{said}"><title>{said}</title>']
    for y in marks:
        at = f"{down(y):.2f}%"
        out.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        out.append(
            f'<text class="tick" x="0" dx="-8" y="{at}" dy=".35em" text-anchor="end">{_tick_text(y, marks)}</text>'
        )
    for x in [t for t in ticks(left, right, 4) if left <= t <= right and t == round(t)] or [left]:
        out.append(f'<text class="tick" x="{across(x):.2f}%" y="100%" dy="20" text-anchor="middle">{x:,.0f}</text>')
    out.append('<text class="unit" x="100%" y="100%" dy="36" text-anchor="end">step</text>')
    for _, y in guides:
        out.append(f'<line class="guide" x1="0" x2="100%" y1="{down(y):.2f}%" y2="{down(y):.2f}%"/>')
    out.append('<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none" overflow="visible">')
    out += [f'<path class="line {s.style}" d="{_path(curve, across, down)}"/>' for s, curve in curves]
    out.append("</svg>")
    for s, curve in curves:
        if s.dots or len(curve) < 3:
            out += [
                f'<circle class="dot {s.style}" cx="{across(x):.2f}%" cy="{down(y):.2f}%" r="4">'
                f"<title>{escape(s.name)}, step {x:,.0f}: {number_text(y)}</title></circle>"
                for x, y in curve
                if math.isfinite(y)
            ]
    for label, y in guides:
        out.append(
            f'<text class="on guided" x="100%" y="{down(y):.2f}%" dy="-6" text-anchor="end">{escape(label)}</text>'
        )
    out.append("</svg></div>")
    return "".join(out)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """A row of (name, style class), each with a piece of its line."""
    items = "".join(
        f'<li><svg aria-hidden="true"><line class="line {style}" x1="0" x2="100%" y1="50%" y2="50%"/></svg>'
        f"{escape(name)}</li>"
        for name, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _axis(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """The ends of the y axis, a little beyond the values, and the marks that lie between them."""
    if log:
        low, high = low / 1.1, high * 1.1
        marks = log_ticks(low, high)
        if len(marks) > 1:
            return low, high, marks
    else:
        room = 0.04 * (high - low) or abs(high) / 10 or 1.0
        low, high = low - room * (low != 0), high + room
    return low, high, [m for m in ticks(low, high) if low <= m <= high]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at or below `low` to at or above `high`."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within the range; only powers of ten, or few of them, where those would be many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [f * 10.0**e for e in exponents for f in (1, 2, 5) if low <= f * 10.0**e <= high]
    if len(marks) > 7:
        marks = [10.0**e for e in exponents if low <= 10.0**e <= high]
    return marks[:: math.ceil(len(marks) / 7) or 1]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [p for p in part if math.isfinite(p[1])]
        kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}) if finite else part[:1]
    return kept


def _path(
    points: Sequence[tuple[float, float]], across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    out, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            out.append(f"{pen}{10 * across(x):.1f} {10 * down(y):.1f}")
            pen = "L"
        else:
            pen = "M"  # a gap
    return "".join(out)


def _tick_text(value: float, marks: Sequence[float]) -> str:
    if max(abs(m) for m in marks) >= 10_000:
        return count_text(value)
    return f"{value:.6g}".replace("e-0", "e-")
