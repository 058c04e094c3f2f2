"""Moving experts between ranks in the middle of a run: weights, masters and optimizer state, and no result changes.

    plan      from the load that was measured, the same on every rank: `moe/placement.py`
    move      every tensor that has a row for each expert: one all_to_all of the rows that change their owner
    remember  the layout says in which order experts are kept now, dispatch sends tokens there, saving undoes it

Copies of bytes, so every weight is the same to the last bit before and after. Without ZeRO the owners of rows are the
ranks of ep, in each of the edp copies for itself. With ZeRO each row of masters and state has one owner among all data
ranks, and rows travel between them; the weights that compute uses travel over ep (ZeRO 1 and 2).

Cost in payload (`expert_traffic.migration_bytes`): of each expert that leaves a rank, and each of the three
projections, the row of the master and of every optimizer state of that shape; with ZeRO 1 and 2 also of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..collectives import all_to_all_async
from ..layout import Placement
from ..memory.masters import SplitMasters
from ..mesh import Axis
from ..model.balancing import RoutingStats
from ..moe.dispatch import ExpertDispatch
from ..moe.placement import Order, by_load, by_number, imbalance, moves
from ..parallel.expert import is_expert, mixtures
from ..parallel.parallelize import Parallel
from ..parallel.zero3 import ShardedWeights

Owner = Callable[[int], tuple[int, int]]  # slot -> index on the axis of the rank that keeps it, and its row there


@dataclass(frozen=True)
class Migration:
    """What placing the experts of one layer anew has done."""

    layer: int
    moved: int  # experts that changed their rank
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
        if not isinstance(moe.dispatch, ExpertDispatch):  # nothing is spread
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
            moe.dispatch.slot = torch.tensor(after, device=parallel.device).argsort()
    return out


@torch.no_grad()
def move_parameter(
    parallel: Parallel, optimizer: torch.optim.Optimizer, name: str, before: Order, after: Order
) -> None:
    """Bring everything that is kept of one parameter of experts into a new order."""
    mesh, place, masters = parallel.mesh, parallel.layout[name], parallel.masters
    master, weight = masters[name], parallel.parameters[name]
    states = _state(optimizer, parallel.trained.get(name, master))
    held = len(before) // mesh.shape.ep
    axis, owner = _owners(place, mesh["ep"], mesh["dp_cp"])
    whole = axis.name != "ep" and not isinstance(parallel.gradients, ShardedWeights)  # rows of the weight of others too
    inside = whole and master.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    kept = [] if inside else [master]
    if isinstance(masters, SplitMasters):  # `master` is a copy
        kept = [weight.data, masters.rests[name]]
    for tensor in [*kept, *states]:
        _move(tensor, axis, owner, before, after)
    if whole:  # and with it the master, if that is a part of it
        _move(weight.data, mesh["ep"], lambda slot: (slot // held, slot % held), before, after)
    elif isinstance(parallel.gradients, ShardedWeights):
        parallel.gradients.publish({weight: master})
    elif weight is not master and not isinstance(masters, SplitMasters):
        weight.data.copy_(master)
    parallel.layout[name] = replace(place, order=after)


def _state(optimizer: torch.optim.Optimizer, master: Tensor) -> list[Tensor]:
    """What the optimizer keeps of a master, element by element; its step counter stays."""
    return [value for value in optimizer.state.get(master, {}).values() if value.shape == master.shape]


def _owners(place: Placement, ep: Axis, data: Axis) -> tuple[Axis, Owner]:
    """Who keeps the master of which slot."""
    held = place.shape[0] // ep.size
    rows = next((shard.ranges[0][1] for shard in place.shards if shard.axis == "edp"), 0)
    if not rows:
        return ep, lambda slot: (slot // held, slot % held)
    return data, lambda slot: (slot % held // rows * ep.size + slot // held, slot % held % rows)


def _move(tensor: Tensor, axis: Axis, owner: Owner, before: Order, after: Order) -> None:
    """Rows of a tensor, one an expert, from their owners before to those after, in place."""
    if tensor.dtype == torch.int16:  # halves of masters; no backend sends int16, and only bits are copied here
        tensor = tensor.view(torch.bfloat16)
    was = {expert: owner(slot) for slot, expert in enumerate(before)}
    will = {expert: owner(slot) for slot, expert in enumerate(after)}
    me = axis.index
    here = [expert for expert in sorted(was) if was[expert][0] == me]
    going = sorted((will[e][0], e) for e in here if will[e][0] != me)
    coming = sorted((was[e][0], e) for e in will if will[e][0] == me and was[e][0] != me)
    sends, receives = ([sum(rank == r for rank, _ in each) for r in range(axis.size)] for each in (going, coming))
    old = tensor.clone()  # also where an expert only changes its slot
    sent = old[[was[e][1] for _, e in going]]
    got = torch.empty(len(coming), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    all_to_all_async(got, sent, axis, receives, sends).wait()
    for row, (_, expert) in zip(got, coming, strict=True):
        tensor[will[expert][1]] = row
    for expert in here:
        if will[expert][0] == me:
            tensor[will[expert][1]] = old[was[expert][1]]


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
