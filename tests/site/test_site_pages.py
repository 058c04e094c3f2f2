"""Every built page: no dead link, nothing loaded from elsewhere, no picture without words."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow  # builds the site

LOADS = {"link", "script", "img", "source", "iframe", "video", "audio", "object", "embed", "use"}


class Page(HTMLParser):
    """What a page names: its anchors, its links, what it loads, its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name, value in attrs if name in ("id", "name") and value}
        if tag == "img":
            self.pictures.append(values)
        for name in ("href", "src", "data", "srcset"):
            if value := values.get(name):
                (self.loads if tag in LOADS else self.links).append(value)


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_there_are_pages(pages: dict[Path, Page], site: Path) -> None:
    names = {path.relative_to(site).as_posix() for path in pages}
    assert {"index.html", "api/index.html", "api/collectives.html", "CONTRIBUTING.html"} <= names


def test_no_link_is_dead(pages: dict[Path, Page], site: Path) -> None:
    dead = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                dead.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                dead.append(f"{path.relative_to(site)}: {link} (no such anchor)")
    assert not dead, "\n".join(sorted(set(dead)))


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page], site: Path) -> None:
    outside = [f"{page.path}: {load}" for page in pages.values() for load in page.loads if urlsplit(load).netloc]
    for sheet in site.rglob("*.css"):
        outside += [
            f"{sheet}: {url}"
            for url in re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]+", sheet.read_text())
        ]
    assert not outside, "\n".join(outside)


def test_every_picture_has_words(pages: dict[Path, Page]) -> None:
    mute = [
        f"{page.path}: {picture.get('src')}"
        for page in pages.values()
        for picture in page.pictures
        if not picture.get("alt")
    ]
    assert not mute, "\n".join(mute)


def test_every_formula_was_drawn(pages: dict[Path, Page]) -> None:
    left = [path for path in pages if re.search(r'class="arithmatex"', path.read_text())]
    assert not left
