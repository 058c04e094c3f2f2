"""What a learner has done is kept, shown, and never lost half-way."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from picotron_mini.config import UserError
from picotron_mini.course.exercises import exercises
from picotron_mini.course.museum import exhibits
from picotron_mini.course.passes import passed, progress_file, record
from picotron_mini.course.progress import progress_table


def test_record_adds(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    assert passed(file) == set()
    for item_id in ("03.b", "03.a", "03.b"):
        record(item_id, file)
    assert passed(file) == {"03.a", "03.b"}
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"], "nothing is left beside it"


def test_interrupted_write_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "progress.json"
    record("03.a", file)

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record("03.b", file)
    assert passed(file) == {"03.a"}


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "progress.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"progress\.json is not a record"):
        passed(file)


def test_file_lies_at_the_root_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lessons").mkdir()
    for folder in (tmp_path, tmp_path / "lessons"):
        monkeypatch.chdir(folder)
        assert progress_file() == tmp_path / ".progress.json"


def test_table_has_a_row_for_all_and_marks_what_is_done(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    record("03.buckets", file)
    record("03.parameter_reduced", file)
    table = progress_table(file)
    number = len(exercises()) + len(exhibits())
    assert table.row_count == number
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    lines = console.export_text().splitlines()
    assert lines[0].strip() == f"2 of {number} done"
    marked = [line for line in lines if "✓" in line]
    assert len(marked) == 2
    assert "03.buckets" in marked[0] and "03.parameter_reduced" in marked[1]
