"""The answers of 30 seconds folded; and all questions of all chapters on one page, to choose from by chapter and level.

The chapters' files are the only source. Each question appears with its answer of 30 seconds, folded, and a link
to the rest of it. `questions.js` filters; without scripts the page is the whole list.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from markdown.extensions.toc import slugify

LEVELS = ("warm-up", "intermediate", "advanced", "design")
_HEADING = re.compile(r"^## (Q(\d+)\. (.+) \(([\w-]+)\))$", re.MULTILINE)
_SHORT = re.compile(r"^\*\*In 30 seconds\.\*\*\s+(.+?)\s*(?=^<details|^## |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One question of a chapter; `anchor` is where its page shows it."""

    number: int
    text: str
    level: str
    short: str
    anchor: str


def questions(text: str) -> list[Question]:
    """The questions of a chapter's Markdown."""
    found = []
    _, *parts = _HEADING.split(text)
    for heading, number, words, level, body in zip(*(parts[at::5] for at in range(5)), strict=True):
        short = body.partition("<details")[0].replace("**In 30 seconds.**", "").strip()
        found.append(Question(int(number), words, level, short, slugify(heading, "-")))
    return found


def fold(text: str) -> str:
    """A chapter's Markdown with each answer of 30 seconds folded, so that one can answer first."""
    return _SHORT.sub(r'<details markdown="1">\n<summary>In 30 seconds</summary>\n\n\1\n\n</details>\n\n', text)


def collected(root: Path) -> str:
    """The Markdown of the page of all questions; empty when there are none."""
    files = sorted(root.glob("interview_questions/[0-9][0-9]_*.md"))
    sections, names = [], {}
    for path in files:
        text = path.read_text()
        found, number = questions(text), path.stem[:2]
        names[number] = text.partition("\n")[0].removeprefix("# ").removesuffix(": questions")
        items = [_item(number, path.name, question) for question in found]
        sections.append(f'<section markdown="1">\n\n## {names[number]}\n\n' + "\n\n".join(items) + "\n\n</section>")
    if not files:
        return ""
    intro = (
        "# All questions\n\nEach with its answer of 30 seconds, folded. The deep answer, the usual mistake and the "
        "proof of every number are behind its link.\n"
    )
    form = (
        '<form class="filter" aria-label="Filter the questions" hidden>\n'
        + _choice("Chapter", "chapter", names)
        + _choice("Level", "level", {level: level for level in LEVELS})
        + '<p><output></output> <button type="reset">Show all</button></p>\n</form>'
    )
    return "\n\n".join([intro, form, *sections]) + "\n"


def _choice(legend: str, name: str, values: dict[str, str]) -> str:
    boxes = "\n".join(
        f'<label><input type="checkbox" name="{name}" value="{value}"> {html.escape(label)}</label>'
        for value, label in values.items()
    )
    return f"<fieldset>\n<legend>{legend}</legend>\n{boxes}\n</fieldset>\n"


def _item(chapter: str, file: str, question: Question) -> str:
    return (
        f'<details class="asked" data-chapter="{chapter}" data-level="{question.level}" markdown="1">\n'
        f'<summary markdown="span">Q{question.number}. {question.text} ({question.level})</summary>\n\n'
        f"{question.short}\n\n"
        f"[The deep answer to Q{question.number}]({file}#{question.anchor})\n\n</details>"
    )
