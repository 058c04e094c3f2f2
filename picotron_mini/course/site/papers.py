"""Numbers of papers as links: `arXiv 1909.08053` leads to the paper's page.

Where a list of papers says "arXiv" once, the others stand in brackets, as `*GQA* (2305.13245)`, or after a comma,
as `arXiv 2307.09288, Llama 3 2407.21783`: once a page has said the word, a bare number of that form is a paper too.
"""

from __future__ import annotations

import re

from picotron_mini.course.site.prose import edit

# A year and a month, a point, five digits: no decimal number of this course has that form.
_NUMBER = r"\d\d(?:0[1-9]|1[0-2])\.\d{5}"
_PAPER = re.compile(rf"(?<![\w./-])(arXiv[\s:]+)?({_NUMBER})(?![\d%])(?!\.\d)")


def link_papers(page: str) -> str:
    """The page's HTML with the numbers of papers made links; never in code, a heading or another link."""
    said = False

    def link(match: re.Match[str]) -> str:
        nonlocal said
        said = said or bool(match[1])
        return f'<a href="https://arxiv.org/abs/{match[2]}">{match[0]}</a>' if said else match[0]

    return edit(page, lambda text: _PAPER.sub(link, text))
