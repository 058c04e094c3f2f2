"""The table of `plan`: the best layouts, fastest first, in as many columns as the terminal has room for.

A setting that no row changes is not shown; its column is named like its flag. Where the columns are too many for the
width, those that tell least are left out: `--json` has them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.table import Table

from ..config import MeshShape
from ..legality import notices
from .machine import GIB
from .plan import Plan, by_axis
from .predict import Prediction


@dataclass(frozen=True)
class _Column:
    head: str
    cells: list[str]
    less: int = 0  # the highest is left out first; 0: never
    number: bool = True

    @property
    def width(self) -> int:
        return max(len(line) for text in (self.head, *self.cells) for line in text.split("\n")) + 2  # a gap of two


def table(result: Plan, rows: int = 10, width: int = 120) -> Table:
    """The best layouts for a terminal.

    Args:
        rows: how many at most.
        width: columns of text.
    """
    shown: Sequence[Prediction] = result.ranked[:rows] or ([result.smallest] if result.smallest else [])
    if result.ranked:
        number = "the fastest" if len(shown) == 1 else f"the {len(shown)} fastest"
        verdict = f"{len(result.ranked)} of {result.considered} legal layouts fit\n{number}, by predicted step time"
    else:
        verdict = f"NOTHING FITS of {result.considered} legal layouts\nthe one that needs least"
    caption = f"rates: {result.machine.source}"
    if any(found.skew > 1 for found in shown):
        caption += "; step s and GiB are those of ranks with the busiest experts, at the skew that was given"
    noted = next(((found.run.layout, notice) for found in shown for notice in notices(found.run)), None)
    if noted:
        caption += "\nnote on {}: {}".format(*noted)
    out = Table(
        title=f"{result.ranks} ranks of {result.machine.name}, {result.machine.memory / GIB:.3g} GiB each: {verdict}",
        title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    columns = fitting(_columns(shown, width), width)
    for column in columns:
        out.add_column(column.head, justify="right" if column.number else "left", overflow="fold")
    for cells in zip(*(column.cells for column in columns), strict=True):
        out.add_row(*cells)
    return out


def fitting(columns: list[_Column], width: int) -> list[_Column]:
    """The columns for which there is room, in their order."""
    kept = list(columns)
    while sum(column.width for column in kept) + 1 > width and any(column.less for column in kept):
        kept.remove(max(kept, key=lambda column: column.less))
    return kept


def _columns(shown: Sequence[Prediction], width: int) -> list[_Column]:
    def column(head: str, cells: list[str], less: int = 0, number: bool = True) -> _Column:
        return _Column(head, cells, less, number)

    trains = [found.run.train for found in shown]
    out = [column("layout", [_folded(found.run.mesh, width) for found in shown], number=False)]
    if any(found.run.model.moe for found in shown):
        out.append(column("ep", [str(found.run.mesh.ep) for found in shown]))
        if any(found.skew > 1 for found in shown):
            out.append(column("skew", [f"{found.skew:.2f}" for found in shown], less=4))
    out.append(column("micro-\nbatch", [str(train.micro_batch_size) for train in trains]))
    schedules = [found.run.train.schedule if found.run.mesh.pp > 1 else "-" for found in shown]
    between = ["yes" if train.sequence_parallel else "no" for train in trains]
    changed = [
        column("zero", [str(train.zero) for train in trains]),
        column("seq.\npar.", between, number=False),
        column("schedule", schedules, number=False),
        column("recompute", [train.recompute for train in trains], number=False),
    ]
    out += [each for each in changed if set(each.cells) - {"0", "no", "-", "none"}]
    most = [max(found.memory.items(), key=lambda item: item[1]) for found in shown]
    sent = [sum(by_axis(found).values()) / GIB for found in shown]
    return [
        *out,
        column("step s", [f"{found.seconds:.3g}" for found in shown]),
        column("tokens/s", [f"{found.tokens_per_second:,.0f}" for found in shown], less=1),
        column("GiB", [f"{found.memory_bytes / GIB:.3g}" for found in shown]),
        column("of it", [f"{size / GIB:.2g} {kind}" for kind, size in most], less=2, number=False),
        column("GiB sent\na step", [f"{each:.2g}" for each in sent], less=3),
    ]


def _folded(mesh: MeshShape, width: int) -> str:
    """The layout but for ep, which has a column; in a narrow terminal at most two axes a line."""
    axes = str(replace(mesh, ep=1)).split(",")
    if width >= 100 or len(axes) < 3:
        return ",".join(axes)
    return ",".join(axes[:2]) + ",\n" + ",".join(axes[2:])
