"""Putting the site's source together: links turn with the files, and a mistake stops the build."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from picotron_mini.config import UserError
from picotron_mini.course.site.assemble import assemble
from picotron_mini.course.site.chapters import chapters
from picotron_mini.course.site.mathml import formula, render
from picotron_mini.course.site.notebook import fenced, to_markdown

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><circle r="9"/></svg>'


def notebook(path: Path, *cells: nbformat.NotebookNode) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=list(cells)), path)
    return path


def code(source: str, *outputs: nbformat.NotebookNode, **metadata: str) -> nbformat.NotebookNode:
    return v4.new_code_cell(source, execution_count=1, outputs=list(outputs), metadata=metadata)


def picture(words: str = "<Figure size 640x480>") -> nbformat.NotebookNode:
    return v4.new_output("display_data", {"image/svg+xml": SVG, "text/plain": words})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of one chapter and one module."""
    files = {
        "README.md": "# Home\n\n"
        "[lesson](lessons/00_ring.ipynb) [code](picotron_mini/ring.py#send) [all](picotron_mini)\n",
        "LICENSE": "Free.\n",
        "picotron_mini/ring.py": '"""A ring."""\n',
        "tests/test_ring.py": "assert True\n",
        "summary/00_ring.md": "# Ring\n\n[send](../picotron_mini/ring.py#send), [test](../tests/test_ring.py)\n\n"
        "`[a](b)` stays\n\n```\n[c](d)\n```\n\n![figure](ring.svg)\n",
        "summary/ring.svg": SVG,
        "interview_questions/00_ring.md": "# Ring: questions\n\n[home](../README.md), [elsewhere](https://arxiv.org/abs/1)\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    notebook(
        tmp_path / "lessons/00_ring.ipynb",
        v4.new_markdown_cell("# Ring\n\n[why](../summary/00_ring.md#why)"),
        code("1"),
    )
    return tmp_path


def test_links_turn_with_the_files(repository: Path, tmp_path: Path) -> None:
    docs = tmp_path / "out"
    assemble(repository, docs)
    home = (docs / "index.md").read_text()
    assert "[lesson](lessons/00_ring.md) [code](api/ring.md#picotron_mini.ring.send) [all](api/index.md)" in home
    summary = (docs / "summary/00_ring.md").read_text()
    assert "[send](../api/ring.md#picotron_mini.ring.send), [test](../source/tests/test_ring.py.md)" in summary
    assert "`[a](b)` stays" in summary and "```\n[c](d)\n```" in summary
    assert "![figure](ring.svg)" in summary and (docs / "summary/ring.svg").read_text() == SVG
    assert "```python\nassert True\n```" in (docs / "source/tests/test_ring.py.md").read_text()
    questions = (docs / "interview_questions/00_ring.md").read_text()
    assert "[home](../index.md), [elsewhere](https://arxiv.org/abs/1)" in questions
    assert "[why](../summary/00_ring.md#why)" in (docs / "lessons/00_ring.md").read_text()


def test_pages_of_a_chapter_know_each_other(repository: Path, tmp_path: Path) -> None:
    docs = tmp_path / "out"
    assemble(repository, docs)
    assert (
        "# Ring\n\n[Lesson](../lessons/00_ring.md) · **Write-up** · [Questions](../interview_questions/00_ring.md)\n"
    ) in (docs / "summary/00_ring.md").read_text()
    assert "[All chapters' questions](index.md)" in (docs / "interview_questions/00_ring.md").read_text()
    module = (docs / "api/ring.md").read_text()
    assert "Taught in [Ring](../lessons/00_ring.md)." in module and "::: picotron_mini.ring" in module
    assert "| [ring](ring.md) | A ring. |" in (docs / "api/index.md").read_text()
    assert chapters(repository) == ["00_ring"]


def test_a_repository_without_chapters_has_a_site(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Home\n")
    assemble(tmp_path, tmp_path / "out")
    assert (tmp_path / "out/index.md").read_text().endswith("# Home\n")
    assert chapters(tmp_path) == []


def test_what_was_there_before_is_gone(repository: Path, tmp_path: Path) -> None:
    docs = tmp_path / "out"
    docs.mkdir()
    (docs / "old.md").write_text("# Old\n")
    assemble(repository, docs)
    assert not (docs / "old.md").exists()


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("nowhere.md", "there is no nowhere.md"),
        ("tests", "link to a file in it"),
        ("../up.md", r"there is no \.\./up.md"),
    ],
)
def test_a_link_to_nothing_is_refused(repository: Path, link: str, said: str) -> None:
    (repository / "README.md").write_text(f"# Home\n\n[x]({link})\n")
    with pytest.raises(UserError, match=said):
        assemble(repository, repository / "out")


def test_outputs_become_blocks_and_files(tmp_path: Path) -> None:
    path = notebook(
        tmp_path / "lessons/00_ring.ipynb",
        code(
            "f()",
            v4.new_output("stream", text="\x1b[31mred\x1b[0m\n"),
            v4.new_output("stream", text="more\n"),
            picture(),
            v4.new_output("execute_result", {"text/plain": "42"}, execution_count=1),
            alt="A ring [of 4]",
        ),
        code("g()", v4.new_output("display_data", {"text/html": "<b>bold</b>", "text/plain": "bold"})),
        code("h()", picture("A tree of 4")),
    )
    text = to_markdown(path, tmp_path / "out/00_ring")
    assert "```python\nf()\n```\n\n```{.text .output}\nred\nmore\n```\n\n![A ring (of 4)](00_ring/1.svg)" in text
    assert "```{.text .output}\n42\n```" in text
    assert '<div class="output">\n<b>bold</b>\n</div>' in text
    assert "![A tree of 4](00_ring/2.svg)" in text
    assert (tmp_path / "out/00_ring/2.svg").read_text() == SVG


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (v4.new_code_cell("1"), "cell 1 was never run"),
        (code("1", v4.new_output("error", ename="ValueError", evalue="no")), "cell 1 ended in ValueError: no"),
        (code("1", picture()), "cell 1 shows a picture without words"),
        (code("1", v4.new_output("display_data", {"application/javascript": "alert()"})), "shows JavaScript"),
    ],
)
def test_a_notebook_that_cannot_be_shown_is_refused(tmp_path: Path, cell: nbformat.NotebookNode, said: str) -> None:
    path = notebook(tmp_path / "00_ring.ipynb", cell)
    with pytest.raises(UserError, match=said):
        to_markdown(path, tmp_path / "out")


def test_sentences_are_wrapped_and_columns_are_not(tmp_path: Path) -> None:
    for printed, kind in (("a word " * 30, "{.text .output .prose}"), ("a   1 " * 30, "{.text .output}")):
        path = notebook(tmp_path / "00_ring.ipynb", code("f()", v4.new_output("stream", text=f"one\n  {printed}\n")))
        assert f"```{kind}\n" in to_markdown(path, tmp_path / "out")


def test_a_fence_is_longer_than_those_inside() -> None:
    assert fenced("```\nx\n```\n", "text") == "````text\n```\nx\n```\n````"


def test_formulas_become_mathml() -> None:
    page = render(r'<p><span class="arithmatex">\(a &lt; \frac{1}{2}\)</span></p><div class="arithmatex">\[x\]</div>')
    assert page.startswith('<p><span class="formula"><math') and "<mfrac>" in page and "&#x0003C;" in page
    page += render(r'<p>(<span class="arithmatex">\(x\)</span>), <span class="arithmatex">\(y\)</span> z</p>')
    assert (
        '<span class="together">(<span class="formula">' in page and '</span>),</span> <span class="formula">' in page
    )
    assert '<div class="formula"><math' in page and 'display="block"' in page and "arithmatex" not in page


@pytest.mark.parametrize(
    "latex",
    [
        r"\foo{x}",
        r"\begin{aligned} a &= b \end{aligned}",
        r"\left( x",
        "{",
        r"\text{all\_gather}",
        r"a \xrightarrow{b} c",
    ],
)
def test_a_formula_that_would_be_drawn_wrong_is_refused(latex: str) -> None:
    with pytest.raises(UserError, match="cannot be shown"):
        formula(latex, block=True)
