"""Each chapter is whole: its companions exist, its notebook was run, its questions are of one form and proven."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest

from picotron_mini.course.site.chapters import PLAN, chapters

ROOT = Path(__file__).parents[2]
STEMS = chapters(ROOT)
LEVELS = ("warm-up", "intermediate", "advanced", "design")


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str, dict[str, object]]]:
    return [(cell.cell_type, cell.source.strip(), dict(cell.metadata)) for cell in notebook.cells]


def questions(stem: str) -> list[tuple[str, str]]:
    """The (heading, body) of each question of a chapter."""
    text = (ROOT / "interview_questions" / f"{stem}.md").read_text()
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return [(head, body) for head, body in zip(parts[::2], parts[1::2], strict=True) if re.match(r"Q\d+\.", head)]


def proofs(stem: str) -> list[str]:
    found = []
    for _, body in questions(stem):
        for part in re.findall(r"<summary>Proof</summary>(.*?)</details>", body, flags=re.DOTALL):
            found += re.findall(r"^```python\n(.*?)^```", part, flags=re.DOTALL | re.MULTILINE)
    return found


def test_the_first_chapters_are_here() -> None:
    assert {"00_ranks_and_collectives", "03_data_parallel"} <= set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
def test_no_companion_is_missing(stem: str) -> None:
    topic = stem[3:]
    wanted = [f"lessons/{stem}.py", f"lessons/{stem}.ipynb", f"summary/{stem}.md", f"interview_questions/{stem}.md"]
    missing = [name for name in wanted if not (ROOT / name).is_file()]
    if not list(ROOT.glob(f"tests/**/test_{topic}*.py")):
        missing.append(f"tests/**/test_{topic}*.py")
    if f"lessons/{stem}.ipynb" not in (ROOT / "README.md").read_text():
        missing.append("a row in README.md")
    assert not missing


@pytest.mark.parametrize("stem", STEMS)
def test_the_notebook_was_run_in_order(stem: str) -> None:
    notebook = nbformat.read(ROOT / "lessons" / f"{stem}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) >= 3, "a notebook that shows nothing compares with nothing"


@pytest.mark.parametrize("stem", STEMS)
def test_the_pair_is_in_step(stem: str) -> None:
    source = jupytext.read(ROOT / "lessons" / f"{stem}.py")
    notebook = nbformat.read(ROOT / "lessons" / f"{stem}.ipynb", as_version=4)
    assert cells(source) == cells(notebook), "run `make lessons`"


@pytest.mark.parametrize("stem", STEMS)
def test_questions_have_one_form(stem: str) -> None:
    found = questions(stem)
    assert len(found) >= 10
    title = next(chapter.title for chapter in PLAN if chapter.stem == stem)
    first = (ROOT / "interview_questions" / f"{stem}.md").read_text().partition("\n")[0]
    assert first == f"# {stem[:2]} {title}: questions", "the menu of the site shows it"
    for number, (head, body) in enumerate(found, start=1):
        assert re.fullmatch(rf"Q{number}\. .+ \(({'|'.join(LEVELS)})\)", head), head
        assert "**In 30 seconds.**" in body, head
        folded = re.findall(r'<details markdown="1">\n<summary>(.+)</summary>\n\n', body)
        assert folded[:2] == ["Deep answer", "Usual mistake"], head
        assert body.count("<details") == len(folded) == body.count("</details>"), head


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "number"), [(stem, n) for stem in STEMS for n in range(len(proofs(stem)))])
def test_proofs_hold(stem: str, number: int) -> None:
    proof = proofs(stem)[number]
    assert re.search(r"\bassert\b", proof), proof
    exec(compile(proof, f"{stem}, proof {number + 1}", "exec"), {"__name__": "proof"})
