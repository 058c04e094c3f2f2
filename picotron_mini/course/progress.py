"""How far a learner is: every exercise and exhibit of every chapter, and which of them are done."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from .exercises import exercises
from .museum import exhibits
from .passes import passed


def progress_table(file: Path | None = None) -> Table:
    """A row for each exercise and exhibit of each chapter, with a mark where it is done."""
    done = passed(file)
    rows = [(e.chapter, "exercise", e.id, e.title) for e in exercises().values()]
    rows += [(e.chapter, "exhibit", e.id, e.title) for e in exhibits().values()]
    count = sum(item_id in done for _, _, item_id, _ in rows)
    table = Table(title=f"{count} of {len(rows)} done")
    for heading in ("chapter", "kind", "id", "title", "done"):
        table.add_column(heading)
    # a chapter's exercises come before its exhibits; each kind in the order in which the lesson has them
    for chapter, kind, item_id, title in sorted(rows, key=lambda row: row[:2]):
        table.add_row(chapter, kind, item_id, title, "✓" if item_id in done else "")
    return table
