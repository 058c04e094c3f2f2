"""What the build adds to the repository's text: code, links to terms, all questions, the drawing, dates."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from picotron_mini.config import UserError
from picotron_mini.course.site import glossary
from picotron_mini.course.site.assemble import assemble
from picotron_mini.course.site.chapters import PLAN, Chapter, chapters
from picotron_mini.course.site.glossary import PAGE, Term, link_terms, terms
from picotron_mini.course.site.history import last_changes
from picotron_mini.course.site.hooks import on_config, on_page_content
from picotron_mini.course.site.links import turn
from picotron_mini.course.site.listing import LONG, expand, source_of
from picotron_mini.course.site.offline import write_scripts
from picotron_mini.course.site.papers import link_papers
from picotron_mini.course.site.questions import collected, fold, questions
from picotron_mini.course.site.reading_order import PLACE, reading_order

ROOT = Path(__file__).parents[2]

MODULE = '''"""A ring."""

import functools

SIZE = 4
LEFT: int = -1


@functools.cache
def send(x):
    """Send."""
    return x  # to the right


class Ring:
    """A ring."""

    def turn(self):
        return SIZE
'''


@pytest.fixture
def module(tmp_path: Path) -> Path:
    (tmp_path / "picotron_mini").mkdir()
    (tmp_path / "summary").mkdir()
    (tmp_path / "picotron_mini/ring.py").write_text(MODULE)
    return tmp_path


# --- the library's code in a write-up -----------------------------------------------------------------------


def test_the_source_of_a_symbol_is_what_the_file_says(module: Path) -> None:
    path = module / "picotron_mini/ring.py"
    assert source_of(path, "send") == (
        9,
        '@functools.cache\ndef send(x):\n    """Send."""\n    return x  # to the right',
    )
    assert source_of(path, "Ring.turn") == (18, "def turn(self):\n    return SIZE")
    assert source_of(path, "SIZE") == (5, "SIZE = 4")
    assert source_of(path, "LEFT") == (6, "LEFT: int = -1")


def test_a_source_line_is_followed_by_the_code(module: Path) -> None:
    line = "Source: [send](../picotron_mini/ring.py#send)"
    text = expand(module, "summary/00_ring.md", f"before\n\n{line}\n\nafter\n\n```\n{line}\n```\n")
    assert text.startswith(f"before\n\n{line}, `picotron_mini/ring.py`, lines 9–12\n{{ .listing }}\n\n```python\n@func")
    assert text.endswith(f"```\n\nafter\n\n```\n{line}\n```\n"), "what stands in a code block is no source line"
    assert "<details" not in text
    turned = turn(module, "summary/00_ring.md", text, lambda _: None)
    assert "Source: [send](../api/ring.md#picotron_mini.ring.send), " in turned


def test_long_code_is_folded(module: Path) -> None:
    (module / "picotron_mini/ring.py").write_text("def send():\n" + "    print()\n" * LONG)
    text = expand(module, "summary/00_ring.md", "Source: [send](../picotron_mini/ring.py#send)\n")
    assert f"<summary>{LONG + 1} lines of send</summary>\n\n```python\n" in text and text.count("</details>") == 1


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("../picotron_mini/ring.py#receive", "ring.py has no receive"),
        ("../picotron_mini/ring.py#Ring.send", "ring.py has no Ring.send"),
        ("../picotron_mini/tree.py#send", "there is no picotron_mini/tree.py"),
    ],
)
def test_source_that_is_not_there_is_refused(module: Path, link: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        expand(module, "summary/00_ring.md", f"Source: [x]({link})\n")


def test_a_private_symbol_links_to_its_module(module: Path) -> None:
    text = turn(module, "summary/00_ring.md", "[x](../picotron_mini/ring.py#_x)", lambda _: None)
    assert text == "[x](../api/ring.md)"


def test_words_of_a_link_may_be_code_and_code_is_no_link(module: Path) -> None:
    text = "[`x`](../picotron_mini/ring.py) `[x](nowhere)` [the `a]` of it](../picotron_mini/ring.py) [B, T] `(y)`"
    assert turn(module, "summary/00_ring.md", text, lambda _: None) == text.replace(
        "../picotron_mini/ring.py", "../api/ring.md"
    )


# --- the glossary -------------------------------------------------------------------------------------------

KNOWN = [
    Term(("rank",), "rank", "One process."),
    Term(("all_reduce", "all-reduce"), "all_reduce-all-reduce", 'The "sum".'),
    Term(("MFU",), "mfu", "Flops."),
    Term(("process",), "process", "It runs."),
    Term(("process group",), "process-group", "Ranks."),
    Term(("ZeRO",), "zero", "Cut states."),
]


def test_an_entry_is_a_heading_and_a_paragraph() -> None:
    text = "# Glossary\n\nWords.\n\n## all_reduce, all-reduce\n\nThe `sum`,\n[all](x.md).\n\nMore.\n\n## rank\n\nOne.\n"
    assert terms(text) == [
        Term(("all_reduce", "all-reduce"), "all_reduce-all-reduce", "The sum, all."),
        Term(("rank",), "rank", "One."),
    ]


def linked(page: str) -> str:
    """The page with links to terms written as {word}."""
    page = link_terms(page, KNOWN, "g.html")
    return re.sub(r'<a class="term" href="g\.html#[\w-]+" title="[^"]+">([^<]+)</a>', r"{\1}", page)


def test_the_first_use_of_a_term_is_linked() -> None:
    page = link_terms("<p>An all-reduce, an all_reduce.</p>", KNOWN, "g.html")
    assert page == (
        '<p>An <a class="term" href="g.html#all_reduce-all-reduce" title="The &quot;sum&quot;.">all-reduce</a>, '
        "an all_reduce.</p>"
    )
    assert linked("<p>Ranks, and a rank.</p>") == "<p>{Ranks}, and a rank.</p>"
    assert linked("<p>Process groups of ranks</p>") == "<p>{Process groups} of {ranks}</p>"


@pytest.mark.parametrize(
    "page",
    [
        "<h2>A rank</h2>",
        "<p><code>rank</code></p>",
        "<pre><span>rank</span></pre>",
        '<p><a href="x">the <em>rank</em></a></p>',
        "<summary>a rank</summary>",
        "<math><mtext>rank</mtext></math>",
        '<svg><text>rank</text><title>rank</title><path d="M0 0"/></svg>',
        '<img alt="rank" src="x">',
        "<!-- rank -->",
        "<p>from zero, all zeros</p>",
        "<p>a mfu, ranking, frank, rank-local, process-group, rank.py</p>",
        "<p>&lt;x&gt; &#8211; &nbsp;<br></p>",
    ],
)
def test_nothing_else_is_touched(page: str) -> None:
    assert link_terms(page, KNOWN, "g.html") == page


def test_a_word_is_a_term_in_its_chapters_only() -> None:
    """The capacity of a cache is no capacity of an expert."""
    known = [Term(("capacity",), "capacity", "Rows of an expert."), Term(("rank",), "rank", "One process.")]
    for chapter, words in (("08", ["capacity", "rank"]), ("01", ["rank"])):
        page = link_terms("<p>capacity, rank</p>", known, "g.html", chapter)
        assert re.findall(r'<a class="term"[^>]*>(\w+)</a>', page) == words
    assert linked("<p>ZeRO, from zero</p>") == "<p>{ZeRO}, from zero</p>"


def test_words_of_some_chapters_are_in_the_glossary() -> None:
    found = {term.spellings[0] for term in terms((ROOT / PAGE).read_text())}
    assert set(glossary._ONLY) <= found


def test_after_code_terms_are_linked_again() -> None:
    assert linked("<p><code>x</code> rank <a>y</a> MFU</p>") == "<p><code>x</code> {rank} <a>y</a> {MFU}</p>"


def test_the_glossary_has_the_terms_of_the_course() -> None:
    known = terms((ROOT / PAGE).read_text())
    spellings = [spelling for term in known for spelling in term.spellings]
    assert len(spellings) == len(set(spellings)), "a term is defined twice"
    wanted = "rank, world size, all_reduce, reduce_scatter, micro-batch, bubble, 1F1B, stage, tensor parallel, ring"
    assert {*wanted.split(", "), "bucket", "ledger", "payload", "MFU"} <= set(spellings)
    assert all(20 < len(term.definition) < 320 for term in known), "short, and not empty"


# --- papers -----------------------------------------------------------------------------------------------


def test_numbers_of_papers_are_links() -> None:
    page = (
        "<li><em>GQA</em> (arXiv\n2305.13245), <em>RoPE</em> (2104.09864). arXiv 2307.09288, Llama 3 2407.21783.</li>"
    )
    numbers = re.findall(r'<a href="[a-z:/.]+/abs/([\d.]+)">(?:arXiv\s)?\1</a>', link_papers(page))
    assert numbers == ["2305.13245", "2104.09864", "2307.09288", "2407.21783"]
    assert 'href="https://arxiv.org/abs/2305.13245"' in link_papers(page)
    assert re.sub(r"</?a\b[^>]*>", "", link_papers(page)) == page


@pytest.mark.parametrize(
    "page",
    [
        "<p>1910.02054 tokens: nobody said what it is</p>",
        "<p><code>arXiv 1910.02054</code></p>",
        "<pre># arXiv 1910.02054</pre>",
        '<p><a href="https://arxiv.org/abs/1910.02054">ZeRO, arXiv 1910.02054</a></p>',
        "<h2>arXiv 1910.02054</h2>",
        "<p>arXiv 1913.02054, 1910.020541, 1910.0205, v1910.02054</p>",
    ],
)
def test_no_other_number_is_a_paper(page: str) -> None:
    assert link_papers(page) == page


# --- the search without a server ----------------------------------------------------------------------------


def test_the_index_and_the_program_of_the_search_become_scripts(tmp_path: Path) -> None:
    for name, text in (
        ("search/search_index.json", '{"docs": []}'),
        ("assets/javascripts/workers/search.1.min.js", '"a"'),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    write_scripts(tmp_path)
    assert (tmp_path / "search/search_index.js").read_text() == 'var __index = {"docs": []};\n'
    assert (tmp_path / "search/worker.js").read_text() == 'var __searchWorker = "\\"a\\"";\n'


# --- all questions ------------------------------------------------------------------------------------------

QUESTIONS = """# Questions: ring

Words.

## Q1. What is `dp=2`? (warm-up)

**In 30 seconds.** Two [ranks](../README.md).

<details markdown="1">
<summary>Deep answer</summary>

Deep.

</details>

## Q2. Why? (design)

**In 30 seconds.** Because.

<details markdown="1">
<summary>Deep answer</summary>
</details>
"""


def test_short_answers_are_folded() -> None:
    text = fold(QUESTIONS)
    fold_of = '<details markdown="1">\n<summary>In 30 seconds</summary>\n\n{}\n\n</details>\n\n<details markdown="1">'
    for answer in ("Two [ranks](../README.md).", "Because."):
        assert fold_of.format(answer) in text
    assert "**In 30" not in text and text.count("<details") == text.count("</details>") == 4
    last = fold("## Q1. A? (design)\n\n**In 30 seconds.** One.\n\nTwo.\n\n## Q2. B? (design)\n")
    assert "\n\nOne.\n\nTwo.\n\n</details>\n\n## Q2. B? (design)" in last


def test_questions_are_read() -> None:
    first, second = questions(QUESTIONS)
    assert (first.number, first.text, first.level) == (1, "What is `dp=2`?", "warm-up")
    assert (first.short, first.anchor) == ("Two [ranks](../README.md).", "q1-what-is-dp2-warm-up")
    assert (second.number, second.level, second.short) == (2, "design", "Because.")


def test_all_questions_are_on_one_page(tmp_path: Path) -> None:
    (tmp_path / "interview_questions").mkdir()
    (tmp_path / "README.md").write_text("# Home\n")
    assert collected(tmp_path) == ""
    for stem in ("00_ring", "07_star"):
        named = QUESTIONS.replace("# Questions: ring", f"# {stem[:2]} A {stem[3:]} of 3D: questions", 1)
        (tmp_path / f"interview_questions/{stem}.md").write_text(named)
    assemble(tmp_path, tmp_path / "out")
    page = (tmp_path / "out/interview_questions/index.md").read_text()
    assert "search: { exclude: true }" in page
    for name in ("00 A ring of 3D", "07 A star of 3D"):  # as the chapter has it, capitals too
        assert f"## {name}\n" in page and f"> {name}</label>" in page
    assert page.count('<details class="asked"') == 4
    assert (
        '<details class="asked" data-chapter="07" data-level="design" markdown="1">\n<summary markdown="span">' in page
    )
    assert "Two [ranks](../index.md).\n\n[The deep answer to Q1](07_star.md#q1-what-is-dp2-warm-up)" in page
    assert page.count('type="checkbox"') == 2 + 4 and " hidden>" in page


@pytest.mark.parametrize("stem", chapters(ROOT))
def test_no_question_is_left_out(stem: str) -> None:
    path = ROOT / "interview_questions" / f"{stem}.md"
    if path.exists():  # its absence is for test_chapters to report
        text = path.read_text()
        assert len(questions(text)) == len(re.findall(r"^## Q\d", text, flags=re.MULTILINE))
        assert all(question.short for question in questions(text))


# --- the drawing of the chapters ----------------------------------------------------------------------------


def test_every_chapter_has_its_place_in_the_plan() -> None:
    planned = [chapter.stem for chapter in PLAN]
    assert planned == sorted(planned)
    assert set(chapters(ROOT)) <= set(planned), "add it to PLAN in picotron_mini/course/site/chapters.py"
    for chapter in PLAN:
        assert all(need < chapter.number and need in {c.number for c in PLAN} for need in chapter.needs), chapter
    assert (ROOT / "README.md").read_text().count(PLACE) == 1


@pytest.mark.parametrize("chapter", [chapter for chapter in PLAN if chapter.needs], ids=lambda chapter: chapter.stem)
def test_a_lesson_says_itself_what_it_needs(chapter: Chapter) -> None:
    path = ROOT / "lessons" / f"{chapter.stem}.py"
    if path.exists():
        said = path.read_text().partition("# You need ")[2].partition("\n#\n")[0]
        assert all(need in said for need in chapter.needs), said


def test_the_drawing_shows_what_needs_what(tmp_path: Path) -> None:
    plan = (Chapter("00_a", "First <one>"), Chapter("01_b", "Second"), Chapter("02_c", "Third", needs=("00", "01")))
    (tmp_path / "lessons").mkdir()
    (tmp_path / "lessons/01_b.ipynb").touch()
    figure = reading_order(tmp_path, plan)
    root = ElementTree.fromstring(figure)
    svg = root.find("svg")
    assert svg is not None
    assert svg.attrib["aria-label"] == (
        "00 First <one> needs no other chapter. 01 Second needs no other chapter. 02 Third needs 00 and 01."
    )
    assert [link.attrib["href"] for link in svg.findall("a")] == ["lessons/01_b.html"]
    assert len(svg.findall("path[@class='arrow']")) == 2 and len(svg.findall("g[@class='planned']")) == 2
    tops = {int(rect.attrib["y"]) for rect in svg.iter("rect")}
    assert len(tops) == 2, "what needs another chapter is below it"
    assert "dashed" in figure
    for stem in ("00_a", "02_c"):
        (tmp_path / f"lessons/{stem}.ipynb").touch()
    assert "dashed" not in reading_order(tmp_path, plan)


def test_arrows_lead_to_the_next_row() -> None:
    """One that goes further would pass behind a box."""
    svg = ElementTree.fromstring(reading_order(ROOT)).find("svg")
    assert svg is not None
    arrows = [re.findall(r"[\d.]+", path.attrib["d"]) for path in svg.findall("path[@class='arrow']")]
    assert len(arrows) == sum(len(chapter.needs) for chapter in PLAN)
    assert {float(numbers[-1]) - float(numbers[1]) for numbers in arrows} == {39.0}


def test_boxes_of_the_drawing_do_not_overlap() -> None:
    svg = ElementTree.fromstring(reading_order(ROOT)).find("svg")
    assert svg is not None
    boxes = [{k: float(v) for k, v in rect.attrib.items()} for rect in svg.iter("rect")]
    assert len(boxes) == len(PLAN)
    for box in boxes:
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        beside = [other for other in boxes if other is not box and other["y"] == box["y"]]
        assert all(abs(other["x"] - box["x"]) > box["width"] for other in beside)


# --- dates, and where to edit -------------------------------------------------------------------------------


def git(folder: Path, *arguments: str, day: str = "2026-01-02") -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "commit.gpgsign=false")
    env = {"GIT_COMMITTER_DATE": f"{day}T12:00:00Z", "PATH": "/usr/bin:/bin:/usr/local/bin"}
    subprocess.run(["git", *who, *arguments], cwd=folder, env=env, check=True, capture_output=True)


@pytest.fixture
def history(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "README.md").write_text("# Home\n")
    (folder / "CHANGELOG.md").write_text("# Changes\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one", day="2026-01-02")
    (folder / "README.md").write_text("# Home again\n")
    git(folder, "commit", "-q", "-a", "-m", "two", day="2026-03-04")
    return folder


def test_the_last_change_of_a_page_is_from_git(history: Path, tmp_path: Path) -> None:
    assert last_changes(history) == {"README.md": "2026-03-04", "CHANGELOG.md": "2026-01-02"}
    assemble(history, tmp_path / "out")
    assert (
        'source: README.md\ngit_revision_date_localized: "2026-03-04"\n---\n' in (tmp_path / "out/index.md").read_text()
    )


def test_without_history_there_are_no_dates_and_a_word(
    history: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "clone", "-q", "--depth", "1", history.as_uri(), "shallow")
    assert last_changes(tmp_path / "shallow") == {}
    assert "NO DATES: a shallow clone" in capsys.readouterr().err
    assert last_changes(tmp_path) == {}
    assert "NO DATES: fatal: not a git repository" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assemble(history, tmp_path / "out")
    assert "NO DATES: git is not installed" in capsys.readouterr().err
    assert "localized" not in (tmp_path / "out/index.md").read_text()


def content(docs: Path, name: str, html: str, repository: str, **meta: str) -> tuple[str, Any]:
    page = SimpleNamespace(meta=meta, edit_url=None, file=SimpleNamespace(src_uri=name))
    return on_page_content(html, page, {"docs_dir": str(docs), "extra": {"repository": repository}}), page


def test_a_page_can_be_edited_where_the_repository_is_known(tmp_path: Path) -> None:
    _, page = content(tmp_path, "lessons/00_ring.md", "", "https://example.org/me/it/", source="lessons/00_ring.py")
    assert page.edit_url == "https://example.org/me/it/edit/main/lessons/00_ring.py"
    _, page = content(tmp_path, "lessons/00_ring.md", "", "", source="lessons/00_ring.py")
    assert page.edit_url is None
    _, page = content(tmp_path, "api/index.md", "", "https://example.org/me/it")
    assert page.edit_url is None, "a page that is made from no one file"


def test_flags_in_a_line_are_not_broken(tmp_path: Path) -> None:
    html = "<p><code>picotron-mini train --zero-group 2</code></p><pre><code>a --flag</code></pre>"
    found, _ = content(tmp_path, "lessons/00_ring.md", html, "")
    whole = [f'<span class="together">{word}</span>' for word in ("picotron-mini", "--zero-group")]
    assert f"<p><code>{whole[0]} train {whole[1]} 2</code></p>" in found and "<code>a --flag</code></pre>" in found
    tensor, _ = content(tmp_path, "lessons/00_ring.md", "<p><code>tp-1 a-b</code></p>", "")
    assert "together" not in tensor


def test_code_is_not_searched_and_terms_are_linked_in_prose_only(tmp_path: Path) -> None:
    (tmp_path / "summary").mkdir()
    (tmp_path / PAGE).write_text("# Glossary\n\n## rank\n\nOne process.\n")
    html = '<p>rank</p><pre>x</pre><details class="listing"></details><details></details>'
    found, _ = content(tmp_path, "lessons/00_ring.md", html, "")
    assert 'href="../summary/glossary.html#rank"' in found
    assert found.count("data-search-exclude") == 2 and "<details></details>" in found
    for other in (PAGE, "index.md", "api/mesh.md"):
        assert "term" not in content(tmp_path, other, html, "")[0]


def test_the_table_of_contents_is_what_is_there(tmp_path: Path) -> None:
    for name in (
        "index.md",
        "lessons/00_a.md",
        "summary/00_a.md",
        PAGE,
        "interview_questions/00_a.md",
        "interview_questions/index.md",
        "api/index.md",
        "api/config.md",
        "api/course/picture.md",
        "api/course/site/links.md",
        "CHANGELOG.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    config = on_config({"docs_dir": str(tmp_path), "extra": {"repository": "https://example.org/me/it"}})
    assert config["nav"] == [
        {"Home": "index.md"},
        {"Lessons": ["lessons/00_a.md"]},
        {"Write-ups": ["summary/00_a.md"]},
        {"Questions": ["interview_questions/index.md", "interview_questions/00_a.md"]},
        {
            "Library": [
                "api/index.md",
                "api/config.md",
                {"course": ["api/course/picture.md", {"site": ["api/course/site/links.md"]}]},
            ]
        },
        {"Glossary": PAGE},
        {"Changes": "CHANGELOG.md"},
    ]
    assert config["extra"]["social"][0]["link"] == "https://example.org/me/it"
    assert "social" not in on_config({"docs_dir": str(tmp_path), "extra": {"repository": ""}})["extra"]
