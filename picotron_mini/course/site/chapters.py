"""The chapters: which there are, what each is called, and which others it needs.

`PLAN` is the one place that knows what a reader must have read before a chapter. The home page draws it
(`reading_order.py`); a test requires that each chapter in the repository has its entry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

KINDS = {"lessons": "Lesson", "summary": "Write-up", "interview_questions": "Questions"}


@dataclass(frozen=True)
class Chapter:
    """One chapter: its stem (`NN_topic`), its title, and the numbers of the chapters that it builds on.

    What those build on themselves is not named again.
    """

    stem: str
    title: str
    needs: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        """The two digits that the stem begins with."""
        return self.stem[:2]


PLAN = (
    Chapter("00_ranks_and_collectives", "Ranks and collectives"),
    Chapter("01_model_and_its_costs", "The model and its costs"),
    Chapter("02_data_pipeline", "Data pipeline", needs=("00",)),
    Chapter("03_data_parallel", "Data parallel", needs=("00",)),
    Chapter("04_tensor_parallel", "Tensor parallel", needs=("01", "03")),
    Chapter("05_pipeline_parallel", "Pipeline parallel", needs=("01", "03")),
    Chapter("06_context_parallel", "Context parallel", needs=("01", "03")),
    Chapter("07_3d_parallel", "3D parallel", needs=("04", "05", "06")),
    Chapter("08_moe", "Mixture of experts", needs=("06",)),
)


def chapters(root: Path) -> list[str]:
    """The stems (`NN_topic`) of all chapters that have a lesson, a write-up or questions, in order."""
    paths = [path for kind in KINDS for path in root.glob(f"{kind}/[0-9][0-9]_*")]
    return sorted({path.stem for path in paths if path.suffix in (".md", ".py", ".ipynb")})


def companions(root: Path, name: str) -> str:
    """The line of links from the page of the file `name` to the same chapter's other pages; empty for other files."""
    kind, _, file = name.partition("/")
    stem = Path(file).stem
    if kind not in KINDS or not re.fullmatch(r"\d\d_\w+", stem):
        return ""
    suffix = {"lessons": ".ipynb", "summary": ".md", "interview_questions": ".md"}
    links = [
        f"**{label}**" if other == kind else f"[{label}](../{other}/{stem}.md)"
        for other, label in KINDS.items()
        if (root / other / (stem + suffix[other])).exists()
    ]
    if kind == "interview_questions":
        links.append("[All chapters' questions](index.md)")
    return " · ".join(links) + "\n{ .companions }\n"
