"""Dispatch without asking: every rank gets all tokens, and adds what its experts make of them to a sum.

`dispatch.py` sends a row to each rank that needs it, so before each exchange the host must read from its GPU how many
rows go where: the GPU waits for the host, and a step with such a wait cannot be recorded (`parallel/cuda_graph.py`).
Here every shape is known beforehand, whatever the routers decide:

    rank 0: t0 t1 --+              +--> t0 t1 t2 t3   experts 0, 1    y0 y1 y2  0 --+                  +--> y0 y1
                    +- all_gather -+                                                +- reduce_scatter -+
    rank 1: t2 t3 --+              +--> t0 t1 t2 t3   experts 2, 3     0 y1  0 y3 --+                  +--> y2 y3

    1 gather    tokens [N, D] of every rank, and beside them [N, 2 K] in which slots their experts are, with which
                weights -> [ep N, D], [ep N, 2 K]
    2 mask      choices whose slot is on another rank are none here
    3 experts   of this rank; a token's outputs are weighed and added up, zeros if none of its experts is here
    4 scatter   add up the ranks' [ep N, D], keep this rank's tokens -> [N, D]

Both exchanges have their gradients in `collectives`, where each is the other's. A weight has one from the rank that
has its expert, and zeros from all others.

On a GPU nobody may ask how many rows there are either. Of K choices at most as many are here as there are slots, h, so
there are ep N min(K, h) rows, of which the grouped product takes the first ones (`local_dispatch`). The price is memory
for the others. Where a loop takes the experts' rows, the host reads their numbers anyway.

Cost in payload, with w bytes a number of x and g = max(w, 4) of a weight, whatever was decided:
    forward     all_gather N (D w + 2 K g), reduce_scatter ep N D w
    backward    all_gather N D w, reduce_scatter ep N (D w + 2 K g)
A ring carries (ep - 1) N D w each way. An all_to_all carries a row for each other rank that has one of a token's
experts: the same if all have, and less the more of them have none. Here nothing hides behind products.

Source: Megatron-LM, `MoEAllGatherTokenDispatcher` (`--moe-token-dispatcher-type allgather`).
Legend: N tokens of a rank, as many on each, D width, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..collectives import gather_from, scatter_to
from ..model.moe import Experts, fits_grouped, local_dispatch
from .dispatch import SlotDispatch


class GatherDispatch(SlotDispatch):
    """`MoE.dispatch` for experts that are spread over an axis, each of whose ranks gets all tokens."""

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, run: Experts, shared: nn.Module | None) -> Tensor:
        """As `model.moe.local_dispatch`: x [N, D] -> [N, D]. Every rank of the axis calls it, with as many tokens."""
        choices = experts.shape[1]
        wide = torch.promote_types(weights.dtype, torch.float32)  # in which slots are exact
        beside = torch.cat([weights.to(wide), self._slots(experts).to(wide)], 1)  # [N, 2 K]
        rows, beside = gather_from(x, self.axis, 0), gather_from(beside, self.axis, 0)  # [ep N, D], [ep N, 2 K]
        weight, slots = beside[:, :choices], beside[:, choices:].detach().long()
        local = torch.where(slots // self.held == self.axis.index, slots % self.held, -1)
        most = len(rows) * min(choices, self.held) if fits_grouped(rows, run.gate) else None
        out = local_dispatch(rows, local, weight, run, routed=most)  # [ep N, D]
        y = scatter_to(out, self.axis, 0)  # [N, D]
        return y if shared is None else y + shared(x)
