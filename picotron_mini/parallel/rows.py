"""How parameters share one buffer when each rank of an axis owns some rows of every parameter.

The parts are whole rows (dim 0), cut as `layout.split` and PyTorch's `fully_shard` do: 5 rows over 4 ranks are 2, 2,
1, 0. A reduce_scatter or all_gather of a tensor each would pay the latency of a message for every norm, so parameters
travel together; and the collectives want equal parts. So a buffer is a table [N, C]: row r is what rank r owns, padded.

                 parameter a, 5 rows    parameter b, 2 rows
    rank 0       a0  a1                 b0
    rank 1       a2  a3                 b1
    rank 2       a4  -                  -
    rank 3       -   -                  -

    reduce_scatter: all rows filled by every rank -> its own row of the sum
    all_gather:     its own row -> all rows

A parameter's rows follow each other in memory; in the table they do not, for other parameters lie between. So filling
and emptying it copies, two strided copies for each parameter: the full rows, and what is left of an uneven one.

Legend: N ranks of the axis, C columns of the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layout import split


@dataclass(frozen=True)
class Cut:
    """One parameter's place in a buffer [N, C]: `columns` of them from `start` on, `rows` rows of dim 0 a rank."""

    parameter: nn.Parameter
    rows: int  # that each rank owns, but the last ones, which may own fewer
    start: int

    @property
    def columns(self) -> int:
        return self.rows * math.prod(self.parameter.shape[1:])

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """The rows of a tensor of the parameter's shape that `rank` owns, as a view."""
        whole = whole if whole.ndim else whole[None]  # a scalar is one row
        return whole[rank * self.rows : (rank + 1) * self.rows]

    def own(self, row: Tensor, rank: int) -> Tensor:
        """The rows of the parameter that `rank` owns, as a view of its row [C or more] of a buffer."""
        total, *rest = self.parameter.shape or (1,)
        mine = min(self.rows, max(0, total - rank * self.rows))  # not by slicing: the parameter may have no storage
        return row[self.start : self.start + mine * math.prod(rest)].view(mine, *rest)

    def pairs(self, buffer: Tensor, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What belongs together of a buffer [N, C] and a tensor of the parameter's shape: full rows, then the rest."""
        flat = whole.reshape(-1)
        full = len(flat) // self.columns if self.columns else 0
        body, tail = flat[: full * self.columns].view(full, self.columns), flat[full * self.columns :]
        out = [(buffer[:full, self.start : self.start + self.columns], body)]
        if len(tail):
            out.append((buffer[full, self.start : self.start + len(tail)], tail))
        return out


def cut(parameters: Iterable[nn.Parameter], ranks: int, rows: Mapping[nn.Parameter, int]) -> tuple[list[Cut], int]:
    """Lay parameters side by side in a buffer; returns their places and the number of columns.

    Args:
        rows: of dim 0, owned by each rank but the last ones; for parameters that are not listed, by `layout.split`.
    """
    cuts: list[Cut] = []
    columns = 0
    for parameter in parameters:
        total = parameter.shape[0] if parameter.ndim else 1
        cuts.append(Cut(parameter, rows.get(parameter, split(total, ranks)[0][1]), columns))
        columns += cuts[-1].columns
    return cuts, columns


def alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that may share a buffer (one dtype, one device), each once, in the given order."""
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(parameters):
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return list(groups.values())
