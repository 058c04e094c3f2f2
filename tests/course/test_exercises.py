"""Every check is itself checked: it passes the right answer, and tells each planted mistake by its own hint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from picotron_mini.config import UserError
from picotron_mini.course import exercises as module
from picotron_mini.course.exercises import Exercise, Mistake, NotAttempted, check, exercise, exercises, is_empty, judge

pytestmark = pytest.mark.slow  # each check starts ranks

ALL = exercises()
MISTAKES = [(item, mistake) for item in ALL.values() for mistake in item.mistakes]


@pytest.mark.parametrize("item", ALL.values(), ids=list(ALL))
def test_reference_passes(item: Exercise) -> None:
    outcome = judge(item, item.reference)
    assert outcome.passed, outcome


@pytest.mark.parametrize(("item", "mistake"), MISTAKES, ids=[f"{item.id}-{m.name}" for item, m in MISTAKES])
def test_mistake_gets_its_own_hint(item: Exercise, mistake: Mistake) -> None:
    outcome = judge(item, mistake.answer)
    assert outcome.status == "failed"
    assert outcome.hint == mistake.hint


@pytest.mark.parametrize("item", ALL.values(), ids=list(ALL))
def test_stub_is_not_attempted(item: Exercise) -> None:
    assert judge(item, item.stub).status == "not attempted yet"
    assert judge(item, None).status == "not attempted yet"


@pytest.mark.parametrize("item", ALL.values(), ids=list(ALL))
def test_exercise_is_whole(item: Exercise) -> None:
    chapter, _, name = item.id.partition(".")
    assert len(chapter) == 2 and chapter.isdigit() and name.isidentifier()
    assert len(item.mistakes) >= 2
    assert item.title and item.task and item.stub.__doc__
    assert all(mistake.hint for mistake in item.mistakes)


def test_at_least_three_exercises_a_chapter() -> None:
    chapters = [item.chapter for item in ALL.values()]
    assert all(chapters.count(chapter) >= 3 for chapter in set(chapters))


def test_error_on_a_rank_becomes_one_line() -> None:
    def wrong(losses: object, mask: object, axis: object) -> object:
        raise KeyError("no such thing")

    outcome = judge(ALL["03.local_loss"], wrong)
    assert outcome.status == "failed"
    assert re.fullmatch(r"on rank [01]: KeyError: 'no such thing'", outcome.hint)


def test_wrong_type_of_answer_becomes_one_line() -> None:
    outcome = judge(ALL["03.buckets"], lambda sizes, limit: 7)
    assert outcome.status == "failed"
    assert outcome.hint.startswith("TypeError: ")
    assert "\n" not in outcome.hint


def test_check_prints_and_records_only_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    item = ALL["03.buckets"]
    check(item.id)
    check(item.id, item.mistakes[0].answer)
    check(item.id, item.reference, record=False)
    assert not (tmp_path / ".progress.json").exists()
    check(item.id, item.reference)
    assert json.loads((tmp_path / ".progress.json").read_text()) == {"passed": [item.id]}
    assert capsys.readouterr().out.splitlines() == [
        "03.buckets: not attempted yet",
        f"03.buckets: failed: {item.mistakes[0].hint}",
        "03.buckets: passed",
        "03.buckets: passed",
    ]


def test_unknown_exercise_is_named() -> None:
    with pytest.raises(UserError, match=r"'03\.bukets'.*03\.buckets"):
        exercise("03.bukets")


def test_solution_prints_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    module.solution("03.buckets")
    assert capsys.readouterr().out.startswith("def buckets(sizes")


def test_what_counts_as_empty() -> None:
    def dots(x: int) -> None: ...

    def dots_with_docstring(x: int) -> None:
        """Fill me in."""

    def returns_dots(x: int) -> object:
        return ...

    def passes(x: int) -> None:
        """Fill me in."""

    def answers(x: int) -> int:
        return 3

    def computes(x: int) -> int:
        return x

    def raises(x: int) -> None:
        raise NotAttempted

    assert [is_empty(f) for f in (dots, dots_with_docstring, returns_dots, passes)] == [True] * 4
    assert [is_empty(f) for f in (answers, computes, raises, print)] == [False] * 4
