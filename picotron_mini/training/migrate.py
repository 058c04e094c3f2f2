"""Moving experts between ranks in the middle of a run: weights, masters and optimizer state, and no result changes.

    plan      from the load that was measured, the same on every rank: `moe/placement.py`
    move      every tensor that has a row for each expert: one all_to_all of the rows that change their owner
    remember  the layout says in which order experts are kept now, dispatch sends tokens there, saving undoes it

Copies of bytes, so every weight is the same to the last bit before and after. Without ZeRO the owners of rows are the
ranks of ep, in each of the edp copies for itself. With ZeRO each row of masters and state has one owner among all data
ranks, and rows travel between them; the weights that compute uses travel over ep (ZeRO 1 and 2). An expert with copies
(`placement.py`) has as many owners, any of which can send it: a copy more is a row that travels, one less is forgotten.

Cost in payload (`expert_traffic.migration_bytes`): of each expert that comes to another rank, and each of the three
projections, the row of the master and of every optimizer state of that shape; with ZeRO 1 and 2 also of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..collectives import all_to_all_async
from ..memory.masters import SplitMasters
from ..mesh import Axis
from ..model.balancing import RoutingStats
from ..moe.dispatch import SlotDispatch
from ..moe.placement import Holders, Order, by_load, by_number, holders, imbalance, journeys, moves
from ..parallel.expert import is_expert, mixtures
from ..parallel.parallelize import Parallel
from ..parallel.replicas import keepers
from ..parallel.zero3 import ShardedWeights


@dataclass(frozen=True)
class Migration:
    """What placing the experts of one layer anew has done."""

    layer: int
    moved: int  # experts that came to a rank which had them not
    before: float  # busiest rank over the mean, of the load that was measured
    after: float


def place_experts(parallel: Parallel, optimizer: torch.optim.Optimizer, load: Mapping[int, Tensor]) -> list[Migration]:
    """Spread the experts of every layer that this stage holds by their load. Every rank must call it, between steps.

    Args:
        optimizer: over `parallel.trained`.
        load: by layer [E], the same on every rank.
    """
    out = []
    ranks = parallel.mesh.shape.ep
    for moe in [each for chunk in parallel.chunks for each in mixtures(chunk)]:
        if not isinstance(moe.dispatch, SlotDispatch):  # nothing is spread
            continue
        loads = [float(x) for x in load[moe.layer]]
        names = [n for n in parallel.parameters if n.startswith(f"layers.{moe.layer}.") and is_expert(n)]
        before = parallel.layout[names[0]].order or by_number(len(loads))
        after = by_load(loads, ranks, before)
        numbers = imbalance(loads, before, ranks), imbalance(loads, after, ranks)
        out.append(Migration(moe.layer, len(moves(before, after, ranks)), *numbers))
        if after != before:
            for name in names:
                move_parameter(parallel, optimizer, name, before, after)
            moe.dispatch.place(after, parallel.device)
    return out


@torch.no_grad()
def move_parameter(
    parallel: Parallel, optimizer: torch.optim.Optimizer, name: str, before: Order, after: Order
) -> None:
    """Bring everything that is kept of one parameter of experts into a new order."""
    mesh, place, masters = parallel.mesh, parallel.layout[name], parallel.masters
    master, weight = masters[name], parallel.parameters[name]
    states = _state(optimizer, parallel.trained.get(name, master))
    moved = replace(place, order=after)
    axis, was = keepers(replace(place, order=before), mesh)
    will = keepers(moved, mesh)[1]
    whole = axis.name != "ep" and not isinstance(parallel.gradients, ShardedWeights)  # rows of the weight of others too
    inside = whole and master.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    kept = [] if inside else [master]
    if isinstance(masters, SplitMasters):  # `master` is a copy
        kept = [weight.data, masters.rests[name]]
    for tensor in [*kept, *states]:
        _move(tensor, axis, was, will)
    if whole:  # and with it the master, if that is a part of it
        _move(weight.data, mesh["ep"], *(holders(order, mesh.shape.ep) for order in (before, after)))
    elif isinstance(parallel.gradients, ShardedWeights):
        parallel.gradients.publish({weight: master})
    elif weight is not master and not isinstance(masters, SplitMasters):
        weight.data.copy_(master)
    parallel.layout[name] = moved


def _state(optimizer: torch.optim.Optimizer, master: Tensor) -> list[Tensor]:
    """What the optimizer keeps of a master, element by element; its step counter stays."""
    return [value for value in optimizer.state.get(master, {}).values() if value.shape == master.shape]


def _move(tensor: Tensor, axis: Axis, was: Holders, will: Holders) -> None:
    """Rows of a tensor, one an expert, from those that have them to those that shall, in place."""
    if tensor.dtype == torch.int16:  # halves of masters; no backend sends int16, and only bits are copied here
        tensor = tensor.view(torch.bfloat16)
    me, trips = axis.index, journeys(was, will)
    going = sorted((to, e) for e, source, to in trips if source == me)
    coming = sorted((source, e) for e, source, to in trips if to == me)
    sends, receives = ([sum(rank == r for rank, _ in each) for r in range(axis.size)] for each in (going, coming))
    old = tensor.clone()  # also where an expert only changes its slot
    sent = old[[was[e][me] for _, e in going]]
    got = torch.empty(len(coming), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    all_to_all_async(got, sent, axis, receives, sends).wait()
    for row, (_, expert) in zip(got, coming, strict=True):
        tensor[will[expert][me]] = row
    for expert, ranks in will.items():
        if me in ranks and me in was[expert]:
            tensor[ranks[me]] = old[was[expert][me]]


class Placer:
    """Places experts anew every `place_every` steps, by their load since the last time.

    placer = Placer(parallel, optimizer)
    for step in range(steps):
        result = train_step(parallel, optimizer, batches)
        placer.after(step + 1, result.routing)
    """

    def __init__(self, parallel: Parallel, optimizer: torch.optim.Optimizer) -> None:
        self.parallel, self.optimizer = parallel, optimizer
        self.load: Tensor | float = 0.0  # [L, E]

    def after(self, done: int, routing: RoutingStats | None) -> list[Migration]:
        """Note a step's load; where it is time, move experts. On every rank, which all have the same statistics."""
        run = self.parallel.run
        if routing is None or not run.train.place_every:
            return []
        self.load = self.load + routing.counts
        if done % run.train.place_every:
            return []
        load, self.load = dict(zip(run.model.moe_layers, self.load, strict=True)), 0.0
        return place_experts(self.parallel, self.optimizer, load)
