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
from html.parser import HTMLParser

from markdown.extensions.toc import slugify

PAGE = "summary/glossary.md"
_ENTRY = re.compile(r"^## (.+)\n\n((?:.+\n?)+)", re.MULTILINE)
_CLOSED = {"a", "abbr", "button", "code", "form", "label", "math", "pre", "script", "style", "summary", "svg"} | {
    f"h{level}" for level in range(1, 7)
}


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


def link_terms(page: str, known: list[Term], glossary: str) -> str:
    """The page's HTML with the first use of each known term made a link to `glossary`, the address of its page."""
    linker = _Linker(known, glossary)
    linker.feed(page)
    linker.close()
    return "".join(linker.out)


def _plain(markdown: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r"[`*$]", "", text).split())


class _Linker(HTMLParser):
    """Copies HTML, and puts links into the text that may have them."""

    def __init__(self, known: list[Term], glossary: str) -> None:
        super().__init__(convert_charrefs=False)
        self.out: list[str] = []
        self._glossary = glossary
        self._terms = {spelling.lower(): term for term in known for spelling in term.spellings}
        self._used: set[Term] = set()
        self._closed = 0  # how many elements are open that may hold no link
        words = "|".join(map(re.escape, sorted(self._terms, key=len, reverse=True)))
        self._words = re.compile(rf"(?<![\w/.-])({words})(s?)(?![\w/-]|\.\w)" if words else r"(?!)", re.IGNORECASE)

    def handle_data(self, data: str) -> None:
        self.out.append(data if self._closed else self._words.sub(self._link, data))

    def _link(self, match: re.Match[str]) -> str:
        word = match[1]
        term = self._terms[word.lower()]
        if term in self._used or (word not in term.spellings and any(s.isupper() for s in term.spellings)):
            return match[0]  # linked before; or an ordinary word that an abbreviation looks like
        self._used.add(term)
        title = html.escape(term.definition)
        return f'<a class="term" href="{self._glossary}#{term.anchor}" title="{title}">{match[0]}</a>'

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._closed += tag in _CLOSED
        self.out.append(self.get_starttag_text() or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.out.append(self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        self._closed -= tag in _CLOSED
        self.out.append(f"</{tag}>")

    def handle_entityref(self, name: str) -> None:
        self.out.append(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self.out.append(f"&#{name};")

    def handle_comment(self, data: str) -> None:
        self.out.append(f"<!--{data}-->")

    def handle_decl(self, decl: str) -> None:
        self.out.append(f"<!{decl}>")
