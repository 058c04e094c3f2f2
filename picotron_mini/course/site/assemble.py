"""The site: the repository's own files, put in one folder as MkDocs wants them.

Lessons, write-ups and questions live where a reader of the repository meets them, not in a `docs/` folder,
and nothing is written twice for the site. `assemble` copies them into a folder of their own:

    README.md                       ->  index.md
    lessons/NN_topic.ipynb          ->  lessons/NN_topic.md     (see notebook.py)
    summary/, interview_questions/  ->  the same names
    picotron_mini/**/*.py           ->  api/**/*.md             (filled from the docstrings)
    any other file that is linked   ->  source/...md            (its text)

Links are written for the repository and are turned as the files move. `[Reducer](../picotron_mini/parallel/
data.py#Reducer)` opens the file on a code host and the symbol's documentation on the site. A link to
nothing stops the build, and so does any warning of MkDocs.

`python -m picotron_mini.course.site ROOT DOCS` does this much; `mkdocs build --strict` does the rest, and
uses the two hooks at the end of this file.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from picotron_mini.config import UserError
from picotron_mini.course.mathml import render
from picotron_mini.course.notebook import fenced, to_markdown

KINDS = {"lessons": "Lesson", "summary": "Write-up", "interview_questions": "Questions"}
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
_CODE = re.compile(r"(^(`{3,}|~{3,}).*?^\2`*[ \t]*$|(?<!`)`[^`\n]+`(?!`))", re.DOTALL | re.MULTILINE)


def assemble(root: Path, docs: Path) -> None:
    """Write the source of the site of the repository at `root` into the folder `docs`, afresh.

    Raises:
        UserError: a link to nothing, or a notebook that cannot be shown.
    """
    if docs.exists():
        shutil.rmtree(docs)
    docs.mkdir(parents=True)
    _page(root, docs, "README.md", "---\nhide: [navigation]\n---\n\n" + (root / "README.md").read_text())
    if (root / "CONTRIBUTING.md").exists():
        _page(root, docs, "CONTRIBUTING.md", (root / "CONTRIBUTING.md").read_text())
    for path in sorted(root.glob("lessons/[0-9][0-9]_*.ipynb")):
        shutil.copy(path, _made(docs / "lessons" / path.name))
        text = to_markdown(path, docs / "lessons" / path.stem)
        _page(root, docs, f"lessons/{path.name}", _companions(root, f"lessons/{path.stem}", text))
    for kind in ("summary", "interview_questions"):
        for path in sorted((root / kind).rglob("*")) if (root / kind).is_dir() else []:
            name = path.relative_to(root).as_posix()
            if path.suffix == ".md":
                _page(root, docs, name, _companions(root, name.removesuffix(".md"), path.read_text()))
            elif path.is_file():
                shutil.copy(path, _made(docs / name))
    _api(root, docs)
    (docs / "assets").mkdir()
    shutil.copy(Path(__file__).with_name("site.css"), docs / "assets" / "site.css")


def chapters(root: Path) -> list[str]:
    """The stems (`NN_topic`) of all chapters that have a lesson, a write-up or questions, in order."""
    paths = [path for kind in KINDS for path in root.glob(f"{kind}/[0-9][0-9]_*")]
    return sorted({path.stem for path in paths if path.suffix in (".md", ".py", ".ipynb")})


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _page(root: Path, docs: Path, name: str, text: str) -> None:
    """Write the page of the repository's file `name`, its links turned to where their targets went."""
    page = _address(root, name)

    def turn(match: re.Match[str]) -> str:
        return match[1] + _target(root, docs, name, page, match[2]) + match[3]

    pieces = _CODE.split(text)  # prose, code, its fence, prose, ...: code is left alone
    turned = [_LINK.sub(turn, piece) if at % 3 == 0 else piece for at, piece in enumerate(pieces) if at % 3 != 2]
    _made(docs / page).write_text("".join(turned))


def _target(root: Path, docs: Path, name: str, page: str, link: str) -> str:
    if re.match(r"[a-z]+:|#", link) or link.startswith(page.split("/")[-1].removesuffix(".md") + "/"):
        return link  # elsewhere, on this page, or a picture of this lesson
    path, _, symbol = link.partition("#")
    wanted = normpath(f"{name.rpartition('/')[0] or '.'}/{path}")
    if wanted.startswith("..") or not (root / wanted).exists():
        raise UserError(f"{name} links to {link}: there is no {wanted}")
    address = _address(root, wanted)
    if address.startswith("source/"):
        text = f"# {wanted}\n\n" + fenced(
            (root / wanted).read_text(), {".py": "python"}.get(Path(wanted).suffix, "text")
        )
        _made(docs / address).write_text(text + "\n")
    elif address.startswith("api/") and symbol and wanted.endswith(".py"):
        symbol = f"{_dotted(wanted)}.{symbol}"
    return relpath(address, page.rpartition("/")[0] or ".") + (f"#{symbol}" if symbol else "")


def _address(root: Path, name: str) -> str:
    """Where in the site's source the repository's file `name` goes."""
    if name == "README.md":
        return "index.md"
    if name == "picotron_mini":
        return "api/index.md"
    if (root / name).is_dir():
        raise UserError(f"a link to the folder {name}: link to a file in it")
    if re.fullmatch(r"lessons/\d\d_\w+\.(py|ipynb)", name):
        return str(Path(name).with_suffix(".md"))
    if name.startswith("picotron_mini/") and name.endswith(".py") and not Path(name).name.startswith("_"):
        return "api/" + name.removeprefix("picotron_mini/").removesuffix(".py") + ".md"
    if name.split("/")[0] in ("summary", "interview_questions") or name == "CONTRIBUTING.md":
        return name
    return f"source/{name}.md"


def _companions(root: Path, stem: str, text: str) -> str:
    """Put a line of links to the same chapter's other pages under the page's title."""
    kind, _, topic = stem.partition("/")
    if not re.fullmatch(r"\d\d_\w+", topic):
        return text
    suffix = {"lessons": ".ipynb", "summary": ".md", "interview_questions": ".md"}
    links = [
        f"**{label}**" if other == kind else f"[{label}](../{other}/{topic}{suffix[other]})"
        for other, label in KINDS.items()
        if (root / other / (topic + suffix[other])).exists()
    ]
    title, newline, rest = text.partition("\n")
    return f"{title}{newline}\n{' · '.join(links)}\n{{ .companions }}\n{rest}" if title.startswith("# ") else text


def _dotted(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def _api(root: Path, docs: Path) -> None:
    """A page for each module, and one that lists them with the first sentence of their docstrings."""
    taught: dict[str, list[str]] = {}
    for stem in chapters(root):
        for path in root.glob(f"*/{stem}.md"):
            for module in re.findall(r"\.\./(picotron_mini/[\w/]+\.py)", path.read_text()):
                if stem not in taught.setdefault(module, []):
                    taught[module].append(stem)
    rows = ["# The library", "", "| module | what it is |", "|---|---|"]
    for path in sorted(root.glob("picotron_mini/**/*.py"), key=lambda p: (len(p.relative_to(root).parts) > 2, str(p))):
        name = path.relative_to(root).as_posix()
        doc = ast.get_docstring(ast.parse(path.read_text()))
        if path.name.startswith("_") or not doc:
            continue
        address = _address(root, name).removeprefix("api/")
        title = _dotted(name).removeprefix("picotron_mini.")
        rows.append(f"| [{title}]({address}) | {doc.splitlines()[0]} |")
        up = "../" * (1 + address.count("/"))
        lessons = [stem for stem in taught.get(name, []) if (docs / "lessons" / f"{stem}.md").exists()]
        links = ", ".join(f"[{stem.replace('_', ' ')}]({up}lessons/{stem}.md)" for stem in lessons)
        text = f"# {title}\n\n" + (f"Taught in {links}.\n\n" if links else "") + f"::: {_dotted(name)}\n"
        _made(docs / "api" / address).write_text(text)
    _made(docs / "api" / "index.md").write_text("\n".join(rows) + "\n")


def on_config(config: Any) -> Any:
    """MkDocs: the table of contents, from the pages that are there."""
    docs = Path(config["docs_dir"])

    def pages(folder: str) -> list[Any]:
        return [path.relative_to(docs).as_posix() for path in sorted((docs / folder).glob("*.md"))]

    api: list[Any] = sorted(pages("api"), key=lambda name: (name != "api/index.md", name))
    api += [{path.name: pages(f"api/{path.name}")} for path in sorted((docs / "api").iterdir()) if path.is_dir()]
    sections = {"Lessons": pages("lessons"), "Write-ups": pages("summary"), "Questions": pages("interview_questions")}
    config["nav"] = [
        {"Home": "index.md"},
        *({name: found} for name, found in sections.items() if found),
        {"Library": api},
    ]
    if (docs / "CONTRIBUTING.md").exists():
        config["nav"].append({"Contributing": "CONTRIBUTING.md"})
    return config


def on_page_content(html: str, **_: Any) -> str:
    """MkDocs: formulas of a page that was just rendered."""
    return render(html)


if __name__ == "__main__":
    try:
        assemble(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
