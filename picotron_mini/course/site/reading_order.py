"""The home page's drawing: the chapters, and an arrow from each to those that need it.

It is made from `chapters.PLAN` when the site is built, as a vector drawing inside the page: its letters take the
colours of the theme, and the boxes of chapters that exist are links. README.md says where, by a comment that a
code host does not show: `<!-- reading order -->`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

from picotron_mini.course.site.chapters import PLAN, Chapter

PLACE = "<!-- reading order -->"
WIDTH, BOX_W, BOX_H, ROW = 360, 116, 52, 92  # in units of which a phone shows about one a pixel


def reading_order(root: Path, plan: Sequence[Chapter] = PLAN) -> str:
    """The drawing as HTML, with the words that stand for it."""
    at = _positions(plan)
    there = {chapter.number for chapter in plan if (root / "lessons" / f"{chapter.stem}.ipynb").exists()}
    height = max(y for _, y in at.values()) + BOX_H + 2
    arrows = [_arrow(at[need], at[chapter.number]) for chapter in plan for need in chapter.needs]
    boxes = [_box(chapter, *at[chapter.number], linked=chapter.number in there) for chapter in plan]
    caption = "Read by number. An arrow leads from a chapter to those that need it."
    if len(there) < len(plan):
        caption += " A chapter with a dashed frame is not written yet."
    return (
        '<figure class="reading-order" markdown="0">\n'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="group" aria-label="{escape(words(plan))}">\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>\n'
        + "\n".join(arrows + boxes)
        + f"\n</svg>\n<figcaption>{caption}</figcaption>\n</figure>"
    )


def words(plan: Sequence[Chapter] = PLAN) -> str:
    """What the drawing shows, as a sentence a chapter."""
    return " ".join(
        f"{chapter.number} {chapter.title} needs {' and '.join(chapter.needs) or 'no other chapter'}."
        for chapter in plan
    )


def _positions(plan: Sequence[Chapter]) -> dict[str, tuple[float, float]]:
    """The upper left corner of each chapter's box: below all that it needs, and near the middle of them."""
    depth: dict[str, int] = {}
    for chapter in plan:  # each needs earlier ones only
        depth[chapter.number] = 1 + max((depth[need] for need in chapter.needs), default=-1)
    for chapter in plan:  # what needs nothing stands right above what needs it: no arrow passes behind a box
        if not chapter.needs:
            below = [depth[other.number] for other in plan if chapter.number in other.needs]
            depth[chapter.number] = min(below, default=1) - 1
    at: dict[str, tuple[float, float]] = {}
    for level in range(max(depth.values()) + 1):
        row = [chapter for chapter in plan if depth[chapter.number] == level]
        row.sort(key=lambda c: (sum(at[need][0] for need in c.needs) / max(len(c.needs), 1), c.number))
        for place, chapter in enumerate(row):
            at[chapter.number] = ((place + 0.5) * WIDTH / len(row) - BOX_W / 2, 1 + level * ROW)
    return at


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y, to_x, to_y = start[0] + BOX_W / 2, start[1] + BOX_H, end[0] + BOX_W / 2, end[1] - 1
    middle = (y + to_y) / 2
    return f'<path class="arrow" d="M{x:g} {y:g}C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"/>'


def _box(chapter: Chapter, x: float, y: float, *, linked: bool) -> str:
    lines = textwrap.wrap(chapter.title, 17)
    text = f'<text class="number" x="{x + BOX_W / 2:g}" y="{y + 16:g}">{chapter.number}</text>' + "".join(
        f'<text x="{x + BOX_W / 2:g}" y="{y + 31 + 14 * line:g}">{escape(part)}</text>'
        for line, part in enumerate(lines)
    )
    rect = f'<rect x="{x:g}" y="{y:g}" width="{BOX_W}" height="{BOX_H}" rx="4"/>'
    if not linked:
        return f'<g class="planned">{rect}{text}</g>'
    label = escape(f"{chapter.number} {chapter.title}")
    return f'<a href="lessons/{chapter.stem}.html" aria-label="{label}">{rect}{text}</a>'
