"""The site: the repository's own files, put in one folder as MkDocs wants them.

Lessons, write-ups and questions live where a reader of the repository meets them, not in a `docs/` folder,
and nothing is written twice for the site. `assemble` copies them into a folder of their own:

    README.md                       ->  index.md, with the chapters drawn      (reading_order.py)
    lessons/NN_topic.ipynb          ->  lessons/NN_topic.md                    (notebook.py)
    summary/, interview_questions/  ->  the same names, library code put in    (listing.py)
    all the questions               ->  interview_questions/index.md           (questions.py)
    picotron_mini/**/*.py           ->  api/**/*.md, filled from the docstrings
    any other file that is linked   ->  source/...md, its text

Links turn as the files move (links.py). Each page begins with what is known of its file: the name, for "edit
this page", and the day of its last change (history.py).

`python -m picotron_mini.course.site ROOT DOCS` does this much. `mkdocs build --strict` does the rest, and calls
hooks.py for the table of contents, the formulas (mathml.py), the links to papers (papers.py) and to the glossary
(glossary.py), and the search without a server (offline.py).
"""

from __future__ import annotations

import ast
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from picotron_mini.course.site.chapters import chapters, companions
from picotron_mini.course.site.history import last_changes
from picotron_mini.course.site.links import address, dotted, turn
from picotron_mini.course.site.listing import expand
from picotron_mini.course.site.notebook import fenced, to_markdown
from picotron_mini.course.site.questions import collected, fold
from picotron_mini.course.site.reading_order import PLACE, reading_order

ASSETS = ("site.css", "offline.js", "questions.js", "search.js", "theme.js")


@dataclass(frozen=True)
class _Site:
    root: Path
    docs: Path
    changed: dict[str, str]  # the day of a file's last change, where git knows it


def assemble(root: Path, docs: Path) -> None:
    """Write the source of the site of the repository at `root` into the folder `docs`, afresh.

    Raises:
        UserError: a link to nothing, or a notebook that cannot be shown.
    """
    if docs.exists():
        shutil.rmtree(docs)
    docs.mkdir(parents=True)
    site = _Site(root, docs, last_changes(root))
    home = (root / "README.md").read_text()
    if PLACE in home:
        home = home.replace(PLACE, reading_order(root))
    _page(site, "README.md", home, hide="[navigation]")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        if (root / name).exists():
            _page(site, name, (root / name).read_text())
    for path in sorted(root.glob("lessons/[0-9][0-9]_*.ipynb")):
        shutil.copy(path, _made(docs / "lessons" / path.name))
        _page(site, f"lessons/{path.stem}.py", to_markdown(path, docs / "lessons" / path.stem), search="{ boost: 2 }")
    for kind in ("summary", "interview_questions"):
        for path in sorted((root / kind).rglob("*")) if (root / kind).is_dir() else []:
            name = path.relative_to(root).as_posix()
            if path.suffix == ".md":
                text = path.read_text()
                _page(site, name, fold(text) if kind == "interview_questions" else text)
            elif path.is_file():
                shutil.copy(path, _made(docs / name))
    if every := collected(root):
        name = "interview_questions/index.md"  # made here: the search would find each question twice
        _write(site, name, "", turn(root, name, every, lambda _: None), search="{ exclude: true }")
    _api(site)
    (docs / "assets").mkdir()
    for name in ASSETS:
        shutil.copy(Path(__file__).with_name(name), docs / "assets" / name)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _page(site: _Site, name: str, text: str, **meta: str) -> None:
    """Write the page of the repository's file `name`, and those of the files that it links to."""

    def linked(other: str) -> None:
        page = address(site.root, other)
        if page.startswith("source/") and not (site.docs / page).exists():
            language = {".py": "python"}.get(Path(other).suffix, "text")
            content = f"# {other}\n\n" + fenced((site.root / other).read_text(), language) + "\n"
            _write(site, page, other, content, search="{ exclude: true }")

    text = turn(site.root, name, expand(site.root, name, text), linked)
    title, newline, rest = text.partition("\n")
    if title.startswith("# ") and (line := companions(site.root, name)):
        text = f"{title}{newline}\n{line}{rest}"
    _write(site, address(site.root, name), name, text, **meta)


def _write(site: _Site, page: str, name: str, text: str, **meta: str) -> None:
    """Write a page; `name` is the repository's file that it was made from, if it is one."""
    if name:
        meta["source"] = name
    if name in site.changed:
        meta["git_revision_date_localized"] = f'"{site.changed[name]}"'  # the key that the theme shows
    front = "".join(f"{key}: {value}\n" for key, value in meta.items())
    _made(site.docs / page).write_text(f"---\n{front}---\n\n{text}" if front else text)


def _title(page: Path) -> str:
    return re.findall(r"^# (.+)$", page.read_text(), re.MULTILINE)[0]


def _api(site: _Site) -> None:
    """A page for each module, and one that lists them with the first sentence of their docstrings."""
    root, docs = site.root, site.docs
    taught: dict[str, list[str]] = {}
    for stem in chapters(root):
        for path in root.glob(f"*/{stem}.md"):
            for module in re.findall(r"\.\./(picotron_mini/[\w/]+\.py)", path.read_text()):
                if stem not in taught.setdefault(module, []):
                    taught[module].append(stem)
    rows = ["# The library", "", "Every module, with the first line of what it says of itself.", ""]
    rows += ["| module | what it is |", "|---|---|"]
    for path in sorted(root.glob("picotron_mini/**/*.py"), key=lambda p: (len(p.relative_to(root).parts) > 2, str(p))):
        name = path.relative_to(root).as_posix()
        doc = ast.get_docstring(ast.parse(path.read_text()))
        if path.name.startswith("_") or not doc:
            continue
        page = address(root, name)
        title = dotted(name).removeprefix("picotron_mini.")
        rows.append(f"| [{title}]({page.removeprefix('api/')}) | {doc.splitlines()[0]} |")
        up = "../" * page.count("/")
        lessons = [stem for stem in taught.get(name, []) if (docs / "lessons" / f"{stem}.md").exists()]
        links = ", ".join(f"[{_title(docs / 'lessons' / f'{stem}.md')}]({up}lessons/{stem}.md)" for stem in lessons)
        text = f"# {title}\n\n" + (f"Taught in {links}.\n\n" if links else "") + f"::: {dotted(name)}\n"
        # A search must not show the answers of exercises to who looks for a word, nor how the site is made.
        hidden = re.search(r"/course/(tasks|exhibits|site)/", name)
        _write(site, page, name, text, **({"search": "{ exclude: true }"} if hidden else {}))
    _write(site, "api/index.md", "", "\n".join(rows) + "\n", search="{ exclude: true }")  # each line is on its page too
