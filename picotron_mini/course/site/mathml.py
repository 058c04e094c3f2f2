"""Formulas as MathML, made when the site is built.

A browser draws MathML by itself, so a page needs no script and no font from anywhere to show an equation.
The Markdown extension `arithmatex` finds the formulas (`$...$` in a line, `$$...$$` on lines of their own)
and leaves each in an element of class `arithmatex`; `render` replaces what is inside.

The converter passes over what it does not know in silence (`\\foo` becomes the text "\\foo", `aligned` leaves
its ampersands), so the result is checked: a formula that would be drawn wrong stops the build.
"""

from __future__ import annotations

import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert

from picotron_mini.config import UserError

# in a line with the bracket before it and the punctuation behind it, which no line may begin with
_FORMULA = re.compile(r'(\(?)<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\2>([.,;:)]*)', re.DOTALL)
_ARROWS = re.compile(r"\\x(?:left|right)arrow")  # they do not grow with what stands over them


def formula(latex: str, *, block: bool) -> str:
    """One formula as a `<math>` element.

    Raises:
        UserError: the converter does not know a command or an environment in it.
    """
    if _ARROWS.search(latex):
        raise UserError(f"the formula {latex!r} cannot be shown: arrows do not grow; write \\to, or a line of text")
    try:
        text = convert(latex, display="block" if block else "inline")
        unknown = [part for part in ElementTree.fromstring(text).itertext() if "\\" in part]
    except Exception as error:  # the converter raises a class of its own for each mistake; XML one more
        raise UserError(f"the formula {latex!r} cannot be shown: {error or type(error).__name__}") from error
    if unknown:
        raise UserError(
            f"the formula {latex!r} cannot be shown: {unknown[0]!r} is not known; try \\operatorname or \\text"
        )
    return text


def render(page: str) -> str:
    """The page's HTML with each formula that `arithmatex` marked turned into MathML."""

    def replace(match: re.Match[str]) -> str:
        before, tag, latex, after = match[1], match[2], html.unescape(match[3]).strip(), match[4]
        drawn = f'<{tag} class="formula">{formula(latex, block=tag == "div")}</{tag}>'
        together = tag == "span" and (before or after)
        return f'<span class="together">{before}{drawn}{after}</span>' if together else before + drawn + after

    return _FORMULA.sub(replace, page)
