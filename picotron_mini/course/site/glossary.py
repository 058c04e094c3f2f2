"""The glossary: `summary/glossary.md` defines each term once, and pages link the term where they first use it.

An entry is a heading with the term (and its other spellings, after commas), then a paragraph that defines it:

    ## all_reduce, all-reduce

    Every rank hands over a tensor of the same shape, and each receives the sum of them all.

Links are put into the finished HTML, never inside code, a heading, a link, a formula or the line that unfolds an
answer. The definition comes along as the link's title.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from markdown.extensions.toc import slugify

from picotron_mini.course.site.prose import edit

PAGE = "summary/glossary.md"
# Words that mean something else in other chapters: a stage of ZeRO, the capacity of a cache, torch's dispatch.
_ONLY = {
    "capacity": ("08",),
    "dispatch": ("08",),
    "interleaved": ("05", "07"),
    "overlap": ("03", "04", "06", "07", "08"),
    "packing": ("02",),
    "parity": ("00", "03", "07", "08"),
    "stage": ("05", "07"),
}
_ENTRY = re.compile(r"^## (.+)\n\n((?:.+\n?)+)", re.MULTILINE)


@dataclass(frozen=True)
class Term:
    """One entry: all its spellings, where it is on the glossary's page, and its definition without markup."""

    spellings: tuple[str, ...]
    anchor: str
    definition: str


def terms(text: str) -> list[Term]:
    """The entries of the glossary's Markdown."""
    return [
        Term(tuple(heading.split(", ")), slugify(heading, "-"), _plain(definition))
        for heading, definition in _ENTRY.findall(text)
    ]


def link_terms(page: str, known: list[Term], glossary: str, chapter: str = "") -> str:
    """The page's HTML with the first use of each known term made a link to `glossary`, the address of its page.

    Args:
        chapter: the two digits of the page's; words that are terms in some chapters only are left alone in others.
    """
    known = [term for term in known if chapter in _ONLY.get(term.spellings[0], (chapter,))]
    by_spelling = {spelling.lower(): term for term in known for spelling in term.spellings}
    used: set[Term] = set()
    words = "|".join(map(re.escape, sorted(by_spelling, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w/.-])({words})(s?)(?![\w/-]|\.\w)" if words else r"(?!)", re.IGNORECASE)

    def link(match: re.Match[str]) -> str:
        word = match[1]
        term = by_spelling[word.lower()]
        capitals = any(letter.isupper() for spelling in term.spellings for letter in spelling[1:])
        if term in used or (word not in term.spellings and capitals):
            return match[0]  # linked before; or an ordinary word that an abbreviation looks like, as "zero" ZeRO
        used.add(term)
        title = html.escape(term.definition)
        return f'<a class="term" href="{glossary}#{term.anchor}" title="{title}">{match[0]}</a>'

    return edit(page, lambda text: pattern.sub(link, text))


def _plain(markdown: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r"[`*$]", "", text).split())
