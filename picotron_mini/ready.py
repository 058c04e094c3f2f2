"""What happens before any rank exists: refuse what cannot work, prepare the text, make the run's folder.

Everything that a user could have wrong is found here, in one message and with nothing written: the layout, the batch,
the text, the tokenizer, the folder. Only then does `train` start ranks.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from .calibrate import with_bucket
from .config import ConfigError, RunConfig, UserError, to_dict
from .data.loader import Loader, Prepared, prepare
from .layout import to_json
from .legality import resolve
from .monitoring.environment import write_environment
from .parallel.parallelize import layout_of


@dataclass(frozen=True)
class ReadyRun:
    """A run that can start: nothing is open, the text is tokens on disk."""

    run: RunConfig
    prepared: Prepared
    folder: Path


def make_ready(run: RunConfig, gpus: int, ranks: int | None = None) -> ReadyRun:
    """Fill every open setting, check that the run can start, and prepare the text.

    Args:
        gpus: how many GPUs there are.
        ranks: how many ranks `torchrun` has started; None: as many as the layout needs will be.

    Raises:
        UserError: it cannot start.
    """
    mesh = resolve(run, gpus=gpus).mesh  # what can be refused at once is refused before the text is read
    if ranks not in (None, mesh.world_size):
        raise ConfigError(
            f"layout {mesh} needs {mesh.world_size} ranks and torchrun started {ranks}; "
            "set --layout or --nproc-per-node"
        )
    if run.name and (Path(run.name).name != run.name or run.name == ".."):
        raise ConfigError(f"name={run.name!r} must be the name of one folder; --out says where it goes")
    if (length := len(os.fsencode(run.name))) > 255:
        raise ConfigError(f"name={run.name[:20]!r}... has {length} bytes, and a folder's name may have 255")
    _check_writable(Path(run.out))
    folder = Path(run.out) / (run.name or f"{datetime.now():%Y-%m-%d-%H%M%S}")
    if folder.exists():
        raise UserError(f"the run folder {folder} exists and is not overwritten; choose another --name or remove it")
    prepared = _prepare(run)
    vocab_size = run.model.vocab_size or prepared.vocab_size
    if vocab_size < prepared.vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size} is less than the {prepared.vocab_size} entries of the tokenizer "
            f"{run.data.tokenizer!r}; use vocab_size>={prepared.vocab_size}, or 0 to take the tokenizer's"
        )
    run = replace(run, name=folder.name, model=replace(run.model, vocab_size=vocab_size))
    run = resolve(with_bucket(run, gpus), gpus=gpus)
    Loader(prepared, "train", run.train.seq_len, run.train.batch_size, run.train.seed)  # refuses too short a text
    return ReadyRun(run, prepared, folder)


def _check_writable(folder: Path) -> None:
    """Refuse a folder in which nothing can be made. It is not made here, since the run may yet be refused."""
    there, why = folder.absolute(), None
    try:
        while not _exists(there):
            there = there.parent
        if not there.is_dir():
            why = "Not a directory"
        elif not os.access(there, os.W_OK | os.X_OK):
            why = "Permission denied"
    except OSError as error:  # a file on the way, a name that is too long, ...
        why = error.strerror
    if why:
        raise UserError(f"cannot write to {folder}: {why}; choose another folder with --out")


def _exists(path: Path) -> bool:
    """As `path.exists()`, but what hides the answer is an error."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _prepare(run: RunConfig) -> Prepared:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        return prepare(run.data, Path(run.out) / ".cache", progress)


def start_folder(ready: ReadyRun) -> None:
    """Make the run's folder with all that is known before the first step."""
    run = ready.run
    try:
        ready.folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"the run folder {ready.folder} exists and is not overwritten; choose another --name") from None
    write_json(ready.folder / "config.json", to_dict(run))
    write_environment(ready.folder)
    layout = layout_of(run)
    write_json(ready.folder / "layout.json", to_json(layout, run.mesh))


def write_json(path: Path, values: Any) -> None:
    """Write plain data as indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
