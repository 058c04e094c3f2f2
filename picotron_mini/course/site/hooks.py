"""What MkDocs calls while it builds the site: the table of contents, and each page after Markdown became HTML."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.plugins import event_priority

from picotron_mini.course.site.glossary import PAGE, link_terms, terms
from picotron_mini.course.site.mathml import render
from picotron_mini.course.site.offline import write_scripts
from picotron_mini.course.site.papers import link_papers

_PROSE = re.compile(r"(lessons|summary|interview_questions)/\d\d_\w+\.md")
_SECTION = re.compile(
    r'aria-labelledby="(__nav_[\d_]+)_label"([^>]*>\s*<label class="md-nav__title" for="\1">\s*<span[^>]*></span>\s*)'
    r"([^<]+?)(?=\s*</label>)"
)
_BLOCK_OR_INLINE = re.compile(r"<pre.*?</pre>|<code>[^<]*</code>", re.DOTALL)
_NOT_SEARCHED = re.compile(r'<details class="(?:mkdocstrings-source|listing)"|<pre(?=>)')


def on_config(config: Any) -> Any:
    """The table of contents, from the pages that are there, and the link to the repository, if it is known."""
    docs = Path(config["docs_dir"])

    def pages(folder: str, pattern: str = "*.md") -> list[Any]:
        return [path.relative_to(docs).as_posix() for path in sorted((docs / folder).glob(pattern))]

    api: list[Any] = sorted(pages("api"), key=lambda name: (name != "api/index.md", name))
    api += _packages(docs / "api", docs)
    sections = {
        "Lessons": pages("lessons"),
        "Write-ups": [page for page in pages("summary") if page != PAGE],
        "Questions": sorted(pages("interview_questions"), key=lambda name: (not name.endswith("/index.md"), name)),
    }
    config["nav"] = [
        {"Home": "index.md"},
        *({name: found} for name, found in sections.items() if found),
        {"Library": api},
    ]
    single = {"Glossary": PAGE, "Changes": "CHANGELOG.md", "Contributing": "CONTRIBUTING.md"}
    config["nav"] += [{title: page} for title, page in single.items() if (docs / page).exists()]
    if repository := config["extra"].get("repository"):
        config["extra"]["social"] = [
            {"icon": "fontawesome/brands/git-alt", "link": repository, "name": "The repository"}
        ]
    return config


def _packages(folder: Path, docs: Path) -> list[Any]:
    """The pages of the folders in a folder of the library's documentation, nested as they are."""
    return [
        {path.name: [page.relative_to(docs).as_posix() for page in sorted(path.glob("*.md"))] + _packages(path, docs)}
        for path in sorted(folder.iterdir())
        if path.is_dir()
    ]


def on_page_content(html: str, page: Any, config: Any, **_: Any) -> str:
    """A page that was just rendered: formulas, links to papers and terms, what the search leaves out, where to edit."""
    repository, source = config["extra"].get("repository"), page.meta.get("source")
    page.edit_url = f"{repository.rstrip('/')}/edit/main/{source}" if repository and source else None
    html = _BLOCK_OR_INLINE.sub(_kept_whole, link_papers(render(html)))
    name = page.file.src_uri
    glossary = Path(config["docs_dir"]) / PAGE
    if _PROSE.fullmatch(name) and glossary.exists():
        up = relpath(PAGE.removesuffix(".md") + ".html", name.rpartition("/")[0])
        html = link_terms(html, terms(glossary.read_text()), up, chapter=name.rpartition("/")[2][:2])
    # Prose is what is searched: with all code in it, the index would be most of what the home page loads.
    return _NOT_SEARCHED.sub(lambda match: f"{match[0]} data-search-exclude", html)


def _kept_whole(match: re.Match[str]) -> str:
    """Code in a line, whose flags and names a browser would break behind their hyphens."""
    if match[0].startswith("<pre"):
        return match[0]
    return re.sub(r"(?<![\w-])(?:--?\w[\w-]*|picotron-mini)", r'<span class="together">\g<0></span>', match[0])


def on_post_page(output: str, **_: Any) -> str:
    """A page that is done: names for the parts of the theme that have none, or have that of something hidden."""
    output = output.replace('role="dialog">', 'role="dialog" aria-label="Search">')
    return _SECTION.sub(r'aria-label="\3"\2\3', output)


@event_priority(-100)  # after the search has written its index
def on_post_build(config: Any, **_: Any) -> None:
    """The site is there: make the search's index, which each page loads, smaller; let it do without a server."""
    index = Path(config["site_dir"]) / "search" / "search_index.json"
    index.write_text(re.sub("</?code>", "", index.read_text()))  # markup that no search looks for
    write_scripts(Path(config["site_dir"]))
