"""What a learner has done: the exercises that passed and the exhibits that were killed.

Kept as a list of ids in `.progress.json` at the root of the repository (the nearest folder above that has
`lessons/`), or in the current folder if there is none. Only a passed `check` or `kill` writes it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..config import UserError

NAME = ".progress.json"


def progress_file() -> Path:
    """Where progress is kept; the file need not exist."""
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "lessons").is_dir()), here)
    return root / NAME


def passed(file: Path | None = None) -> set[str]:
    """The ids that are done.

    Raises:
        UserError: the file is not what `record` writes.
    """
    file = file or progress_file()
    if not file.exists():
        return set()
    try:
        done = json.loads(file.read_text())["passed"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a record of progress; delete it to start anew") from error
    return set(done)


def record(item_id: str, file: Path | None = None) -> None:
    """Add one id. The file is replaced whole, so that an interruption leaves the old one or the new one."""
    file = file or progress_file()
    done = passed(file) | {item_id}
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    fresh.write_text(json.dumps({"passed": sorted(done)}, indent=1) + "\n")
    fresh.replace(file)
