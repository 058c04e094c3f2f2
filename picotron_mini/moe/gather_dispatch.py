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

Of the two exchanges each is the other's gradient (`exchange.py`). A weight has one from the rank that has its expert,
and zeros from all others. While tokens travel the shared expert computes, if there is one; `parts` cuts the tokens, and
while the experts compute one part, the next is gathered and the former's sums travel back.

On a GPU nobody may ask how many rows there are either. Of K choices at most as many are here as there are slots, h, so
there are ep N min(K, h) rows, of which the grouped product takes the first ones (`local_dispatch`). The price is memory
for the others. Where a loop takes the experts' rows, the host reads their numbers anyway.

Cost in payload, with w bytes a number of x and g = max(w, 4) of a weight, whatever was decided:
    forward     all_gather N (D w + 2 K g), reduce_scatter ep N D w
    backward    all_gather N D w, reduce_scatter ep N (D w + 2 K g)
A ring carries (ep - 1) N D w each way. An all_to_all carries a row for each other rank that has one of a token's
experts: the same if all have, and less the more of them have none.

Source: Megatron-LM, `MoEAllGatherTokenDispatcher` (`--moe-token-dispatcher-type allgather`).
Legend: N tokens of a rank, as many on each, D width, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..collectives import gather_from
from ..mesh import Axis
from ..model.moe import Experts, fits_grouped, local_dispatch
from .dispatch import SlotDispatch, part_sizes
from .exchange import GatherTrip, ScatterTrip


class GatherDispatch(SlotDispatch):
    """`MoE.dispatch` for experts that are spread over an axis, each of whose ranks gets all tokens.

    Args:
        axis, num_experts, layer: as of `SlotDispatch`.
        parts: in how many the tokens are cut, to compute one while the next travels.
    """

    def __init__(self, axis: Axis, num_experts: int, parts: int = 1, layer: int = 0) -> None:
        super().__init__(axis, num_experts, layer)
        self.parts = parts

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, run: Experts, shared: nn.Module | None) -> Tensor:
        """As `model.moe.local_dispatch`: x [N, D] -> [N, D]. Every rank of the axis calls it, with as many tokens."""
        choices, ranks = experts.shape[1], self.axis.size
        wide = torch.promote_types(weights.dtype, torch.float32)  # in which slots are exact
        beside = torch.cat([weights.to(wide), self._slots(experts).to(wide)], 1)  # [N, 2 K]
        beside = gather_from(beside, self.axis, 0).view(ranks, -1, 2 * choices)
        sizes = part_sizes(len(x), self.parts)
        going = []
        for part in x.split(sizes) if self.parts > 1 else [x]:  # one part is not cut: its gradient would be copied
            trip = GatherTrip(self.axis)
            going.append((trip, trip.start(part)))
        y = None if shared is None else shared(x)
        coming = []
        for (trip, ticket), those in zip(going, beside.split(sizes, 1), strict=True):
            rows = trip.wait(ticket)  # [ep n, D]
            weight, slots = those[..., :choices].flatten(0, 1), those[..., choices:].detach().flatten(0, 1).long()
            local = torch.where(slots // self.held == self.axis.index, slots % self.held, -1)
            most = len(rows) * min(choices, self.held) if fits_grouped(rows, run.gate) else None
            back = ScatterTrip(self.axis)
            coming.append((back, back.start(local_dispatch(rows, local, weight, run, routed=most))))
        found = [back.wait(ticket) for back, ticket in coming]  # [n, D] each
        out = found[0] if self.parts == 1 else torch.cat(found)
        return out if y is None else y + out
