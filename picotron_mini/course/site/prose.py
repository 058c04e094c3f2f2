"""Changes to the text of a finished page that leave its code, formulas, links and headings alone."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser

_CLOSED = {"a", "abbr", "button", "code", "form", "label", "math", "pre", "script", "style", "summary", "svg"} | {
    f"h{level}" for level in range(1, 7)
}


def edit(page: str, change: Callable[[str], str]) -> str:
    """The page's HTML with `change` applied to each piece of text that may hold a link; all else stays as it is."""
    editor = _Editor(change)
    editor.feed(page)
    editor.close()
    return "".join(editor.out)


class _Editor(HTMLParser):
    """Copies HTML, and changes the text outside closed elements."""

    def __init__(self, change: Callable[[str], str]) -> None:
        super().__init__(convert_charrefs=False)
        self.out: list[str] = []
        self._change = change
        self._closed = 0  # how many elements are open that may hold no link

    def handle_data(self, data: str) -> None:
        self.out.append(data if self._closed else self._change(data))

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
