"""How parameters share one buffer when each rank of an axis owns some rows of every parameter.

The parts are whole rows (dim 0), cut as `layout.split` and PyTorch's `fully_shard` do: 5 rows over 4 ranks are 2, 2,
1, 0. The collectives want equal parts, so a parameter is a table with a row for each rank, padded. A buffer is one
table behind the other, and of each of them a rank owns one row:

                 parameter a, 5 rows           parameter b, 2 rows
    buffer       a0 a1 | a2 a3 | a4 -  | -  -  ; b0 | b1 | - | -         N C numbers
    rank 0       a0 a1                           b0                      C numbers
    rank 1               a2 a3                        b1
    rank 2                       a4 -                      -
    rank 3                               -  -                  -

    reduce_scatter: all tables filled by every rank -> its own rows of the sum
    all_gather:     its own rows -> all tables

Padding comes last, so the beginning of a table is the parameter itself, in its own shape and in one piece: a gradient
is added up there, a weight is used there, and nothing is copied before or behind a collective. Its price is that a
buffer is as many messages as it has tables. A reduce_scatter of each would pay the latency of a message for every norm;
`collectives.reduce_scatter_several` makes them one message.

What comes first begins at a multiple of 128 bytes, so that kernels can read 16 bytes at once: a parameter whose size
would shift those behind it is put last.

Legend: N ranks of the axis, C columns of a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layout import split

ALIGNED = 64  # elements: 128 bytes even of a 2-byte dtype


@dataclass(frozen=True)
class Cut:
    """One parameter's place in a buffer: of C columns its own from `start` on, of its rows `rows` for each rank."""

    parameter: nn.Parameter
    rows: int  # of dim 0, that each rank owns, but the last ones, which may own fewer
    start: int

    @property
    def columns(self) -> int:
        return self.rows * math.prod(self.parameter.shape[1:])

    def table(self, buffer: Tensor, ranks: int) -> Tensor:
        """The parameter's table, flat, as a view of a buffer [ranks C or more]."""
        return buffer[ranks * self.start : ranks * (self.start + self.columns)]

    def whole(self, table: Tensor) -> Tensor:
        """What a table has of the parameter, in its shape, as a view; the rest is padding."""
        return table[: self.parameter.numel()].view(self.parameter.shape)

    def padding(self, table: Tensor) -> Tensor:
        """What is left of a table."""
        return table[self.parameter.numel() :]

    def row(self, row: Tensor) -> Tensor:
        """A rank's row of the table, padded, as a view of what it owns of a buffer, [C or more]."""
        return row[self.start : self.start + self.columns]

    def own(self, row: Tensor, rank: int) -> Tensor:
        """The rows of the parameter that `rank` owns, as a view of what it owns of a buffer, [C or more]."""
        total, *rest = self.parameter.shape or (1,)
        mine = min(self.rows, max(0, total - rank * self.rows))  # not by slicing: the parameter may have no storage
        return row[self.start : self.start + mine * math.prod(rest)].view(mine, *rest)

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """The rows of a tensor of the parameter's shape that `rank` owns, as a view."""
        whole = whole if whole.ndim else whole[None]  # a scalar is one row
        return whole[rank * self.rows : (rank + 1) * self.rows]


def cut(parameters: Iterable[nn.Parameter], ranks: int, rows: Mapping[nn.Parameter, int]) -> tuple[list[Cut], int]:
    """Lay parameters one behind the other in a buffer; returns their places and the number of columns.

    Args:
        rows: of dim 0, owned by each rank but the last ones; for parameters that are not listed, by `layout.split`.
    """
    cuts: list[Cut] = []
    columns = 0
    found = [Cut(p, rows.get(p, split(p.shape[0] if p.ndim else 1, ranks)[0][1]), 0) for p in parameters]
    for each in sorted(found, key=lambda each: each.columns % ALIGNED > 0):
        cuts.append(Cut(each.parameter, each.rows, columns))
        columns += each.columns
    return cuts, columns


def alike(
    parameters: Iterable[nn.Parameter], halves: Mapping[nn.Parameter, str] | None = None
) -> list[list[nn.Parameter]]:
    """Parameters that may share a buffer, each once, in the given order.

    They have one dtype and one device, and if `halves` is given (`deferred.halves`) their gradients come in the same
    half of a backward. In a buffer with others they would keep whole gradients between the halves.
    """
    groups: dict[tuple[torch.dtype, torch.device, str], list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(parameters):
        groups.setdefault((parameter.dtype, parameter.device, (halves or {}).get(parameter, "")), []).append(parameter)
    return list(groups.values())
