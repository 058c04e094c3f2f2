"""Gradients of which several ranks hold a part, though each holds the whole parameter.

Two cases, both easy to forget, and both leave a run that trains and is wrong:

- A **tied embedding** in a pipeline is on the first stage (the look-up) and on the last (the head). Each stage's
  gradient is one term of the sum; without the exchange the two copies drift apart.
- A **norm on queries and keys** is one weight [head_dim] used by all heads. A tensor-parallel rank sees its own heads
  only, so its gradient is a partial sum. (The other norms see whole tokens and need nothing.)

    stage 0:       g_lookup --send--> g_lookup + g_head        stage last:   g_head <--> the same sum
    tp rank r:     g_r  --all_reduce-->  sum_r g_r

Cost a step: the local part of the embedding's gradient from each of the two stages, and 2 head_dim numbers a layer.
Both after data parallelism has summed its part: sums may be taken in any order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..collectives import all_reduce, receive, send
from ..layout import Layout
from ..mesh import Mesh


def sum_partial_gradients(gradients: Mapping[str, Tensor], layout: Layout, mesh: Mesh) -> None:
    """Complete the partial gradients, in place.

    Args:
        gradients: this rank's gradient by global name, for the parameters that have one.
    """
    over_tp = [g for name, g in gradients.items() if "tp" in layout[name].sum_axes]
    if over_tp and mesh.shape.tp > 1:
        flat = all_reduce(torch.cat([g.flatten() for g in over_tp]), mesh["tp"])
        for gradient, total in zip(over_tp, flat.split([g.numel() for g in over_tp]), strict=True):
            gradient.copy_(total.view_as(gradient))
    for name, gradient in gradients.items():
        if "pp" in layout[name].sum_axes and gradient.numel():  # an uneven shard may be empty, at both ends
            _exchange(gradient, mesh, layout[name].stages)


def _exchange(gradient: Tensor, mesh: Mesh, stages: tuple[int, ...]) -> None:
    """Add the gradients of the two stages. The directions have a process group each, so neither waits."""
    first, last = stages
    down, up = mesh["pp"], mesh["pp.backward"]
    theirs = torch.empty_like(gradient)
    mine = gradient.contiguous()
    if down.index == first:
        works = [send(mine, down, last), receive(theirs, up, last)]
    else:
        works = [receive(theirs, down, first), send(mine, up, first)]
    for work in works:
        work.wait()
    gradient.add_(theirs)
