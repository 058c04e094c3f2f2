"""Copies of hot experts: their gradients are added up, so that they stay copies.

An expert that many tokens choose may be on several ranks of ep, where each copy gets a part of its tokens
(`moe/placement.py`, `moe/dispatch.py`). What a copy's backward finds is the gradient of that part:

    expert 0 on ranks 0 and 2      rank 0: g0 --+--> g0 + g2 on both, in one order of additions: the same to the bit
                                   rank 2: g2 --+

Equal gradients make equal steps of the optimizer, so weights, masters and moments of all copies stay equal. Leave the
sum out and each copy learns from its own tokens only: loss falls, nothing crashes, and there are more experts than the
model has. The gradient norm counts an expert once (`Placement.once`), or clipping would be too strong.

The copies of an expert on the other ranks of edp have been summed by then, as those of any expert. With ZeRO a row of
gradients has one owner among all data ranks, and the owners of copies trade rows.

Each rank hands its row to the c - 1 others, in one all_to_all a parameter, and adds up what came, by rank. An
all_reduce over ep would hand over a row, and zeros for every expert that is copied elsewhere.

Cost a step in payload: of each copy on a rank, in each of the three projections, (c - 1) D I numbers of a gradient. It
is not hidden behind backward. For c copies all in all c (c - 1) rows: few copies of many experts are cheaper than many
of few.

Papers: copies by load in training, FlexMoE (arXiv 2304.03946); with optimizer state that stays where it is, arXiv
2504.19925.
Legend: c copies of an expert, D width, I inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..collectives import all_to_all_async
from ..layout import Layout, Placement
from ..mesh import Axis, Mesh
from ..moe.placement import Holders, holders
from .expert_traffic import owned_slots


def keepers(place: Placement, mesh: Mesh) -> tuple[Axis, Holders]:
    """Which ranks keep the masters of which expert: of ep, or of dp and cp where ZeRO cuts."""
    rows = owned_slots(place)
    return mesh["dp_cp" if rows else "ep"], holders(place.order, mesh.shape.ep, rows)


@torch.no_grad()
def sum_replicas(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> None:
    """Complete the gradients of experts that have copies, in place. Every rank must call it.

    Args:
        gradients: this rank's gradient by global name, for the parameters that have one; summed over edp.
    """
    for name, gradient in gradients.items():
        if len(layout[name].order) > layout[name].shape[0]:
            _sum(gradient, *keepers(layout[name], mesh))


def _sum(gradient: Tensor, axis: Axis, kept: Holders) -> None:
    """Add up rows of a gradient [h, ...], one an expert here, with those of their copies."""
    me = axis.index
    mine = {expert: rows for expert, rows in sorted(kept.items()) if me in rows and len(rows) > 1}
    trades = [(rank, expert) for rank in range(axis.size) if rank != me for expert in mine if rank in mine[expert]]
    numbers = [sum(rank == other for other, _ in trades) for rank in range(axis.size)]  # sent as many as received
    sent = gradient[[mine[expert][me] for _, expert in trades]]
    got = torch.empty_like(sent)
    all_to_all_async(got, sent, axis, numbers, numbers, "replicas").wait()
    arrived = dict(zip(trades, got, strict=True))
    for expert, rows in mine.items():
        own = gradient[rows[me]]
        terms = [own if rank == me else arrived[rank, expert] for rank in sorted(rows)]
        own.copy_(sum(terms[1:], terms[0]))
