"""Every built page: no dead link, nothing loaded from elsewhere, no picture without words."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from picotron_mini.course.site.history import last_changes

ROOT = Path(__file__).parents[2]
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
    assert {"index.html", "api/index.html", "api/collectives/plain.html", "CONTRIBUTING.html"} <= names


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


def test_pages_say_when_they_changed(pages: dict[Path, Page], site: Path) -> None:
    changes = last_changes(ROOT)
    for name, source in (("lessons/03_data_parallel", "lessons/03_data_parallel.py"), ("index", "README.md")):
        text = (site / f"{name}.html").read_text()
        assert ('class="md-source-file__fact"' in text) == (source in changes)
        assert changes.get(source, "") in text


def test_pages_say_where_to_edit_them(site: Path, tmp_path: Path) -> None:
    """Only where the repository's address is known; and even then nothing asks the code host for anything."""
    address = "https://example.org/me/it"
    assert 'rel="edit"' not in (site / "index.html").read_text()
    pages = ("index.md", "lessons/03_data_parallel.md", "api/parallel/data.md")
    for name in pages:  # the whole site takes a minute
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / ".site" / "docs" / name, tmp_path / "docs" / name)
    config = tmp_path / "mkdocs.yml"
    hooks = ROOT / "picotron_mini" / "course" / "site" / "hooks.py"
    settings = {"INHERIT": ROOT / "mkdocs.yml", "docs_dir": tmp_path / "docs", "site_dir": tmp_path / "html"}
    lines = [f"{name}: {path}" for name, path in settings.items()]
    config.write_text("\n".join([*lines, f"hooks: [{hooks}]"]))
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "REPO_URL": address}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, source in (
        ("index", "README.md"),
        ("lessons/03_data_parallel", "lessons/03_data_parallel.py"),
        ("api/parallel/data", "picotron_mini/parallel/data.py"),
    ):
        page = Page(tmp_path / "html" / f"{name}.html")
        assert f"{address}/edit/main/{source}" in page.links
        assert (ROOT / source).is_file()
        assert address in page.links
        assert not [load for load in page.loads if urlsplit(load).netloc]
        assert 'data-md-component="source"' not in page.path.read_text(), "the theme would ask for the number of stars"


def test_the_search_finds_prose_once(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    places = {entry["location"].partition("#")[0] for entry in entries}
    assert {"index.html", "summary/glossary.html", "api/parallel/data.html"} <= places
    assert "interview_questions/index.html" not in places and not any(p.startswith("source/") for p in places)
    assert "api/course/museum.html" in places
    assert "api/course/tasks/chapter_03.html" not in places, "answers to exercises"
    assert not any(p.startswith("api/course/site/") for p in places), "how the site is made"
    assert not [entry["location"] for entry in entries if "def __init__(self, parameters" in entry["text"]]
