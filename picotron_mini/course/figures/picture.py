"""Drawings of the lessons: small vector pictures that read well on a white page and on a black one.

The background is transparent, lines and letters are mid-grey, and what is written inside a coloured box is dark on
pale. Letters stay letters in the SVG: they can be searched, and the file is small. Words for those who do not see
the picture come with it, and become its `alt` on the site.
"""

from __future__ import annotations

import io
import re
from typing import Any

GREY = "#767676"  # 4.5 : 1 on white, 4.6 : 1 on black; no other grey has 4.5 on both
INK = "#222222"
PALE = ("#9ecae1", "#fdd0a2", "#a1d99b", "#dadaeb", "#fbb4ae", "#e5d8bd", "#ccebc5", "#fddaec")  # one a rank
SUM = "#e0e0e0"
LINES = ("#3182bd", "#e6550d", "#31a354", "#9e7bd0")  # curves: over 3 : 1 on white and on black
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "picotron_mini",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


class Picture:
    """An SVG that a notebook shows, with the words that stand for it."""

    def __init__(self, svg: str, words: str) -> None:
        self._svg, self._words = svg, words

    def _repr_svg_(self) -> str:
        return self._svg

    def __repr__(self) -> str:
        return self._words


def figure(width: float, height: float) -> Any:
    """A matplotlib figure (inches) that no window and no other cell knows of; draw on it inside `drawing()`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def drawing() -> Any:
    """The style of all pictures, as a `with` block around what makes axes and text."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def picture(fig: Any, words: str) -> Picture:
    """Turn a figure into a picture; `words` say what it shows to whom cannot see it."""
    buffer = io.StringIO()
    with drawing():
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return Picture(re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL), words)
