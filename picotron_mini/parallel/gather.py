"""From the ranks' parts back to whole tensors: for saving weights, and for looking at what is spread out.

One parameter at a time, so that no rank ever needs room for the whole model: the tensor-parallel ranks of its stage
put their slices together, and that stage hands the result to rank 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import all_gather, receive, send
from ..layout import Placement
from ..mesh import Mesh, coordinates


def gather(
    local: Tensor | None, placement: Placement, mesh: Mesh, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Collect one parameter (or its gradient) whole on rank 0; every rank must call it.

    Args:
        local: this rank's part, or None where it has none.
        dtype, device: of the parts.

    Returns:
        The global tensor on rank 0, None elsewhere.
    """
    order = placement.order
    index, home, whole = coordinates(mesh.shape, mesh.rank), placement.stages[0], None
    if index["pp"] == home and local is not None:
        whole = local.detach()
        for shard in reversed(placement.shards):  # the last cut is the first to be put together
            placement = placement.without(shard.axis)
            missing = shard.ranges[0][1] - whole.shape[shard.dim]  # all_gather wants equal parts
            pad = whole.new_zeros([missing if d == shard.dim else n for d, n in enumerate(whole.shape)])
            whole = all_gather(torch.cat([whole, pad], shard.dim), mesh[shard.axis], shard.dim)
            whole = whole.narrow(shard.dim, 0, placement.local_shape(index)[shard.dim])  # copies come later
        if order:
            whole = whole[[order.index(row) for row in range(placement.shape[0])]]  # of copies the first
    if home != 0 and index["dp"] == index["cp"] == index["tp"] == 0:
        if whole is not None:
            send(whole.contiguous(), mesh["pp"], 0).wait()
        elif mesh.rank == 0:
            whole = torch.empty(placement.shape, dtype=dtype, device=device)
            receive(whole, mesh["pp"], home).wait()
    return whole if mesh.rank == 0 else None
