"""What tokens on their way to experts weigh, from what the routers decided: nothing here looks at what was sent.

How many rows travel is up to the router, so there is no formula for it before a step. There is one for the bytes of
given rows; and one for the rows to expect if all sets of K experts are equally likely. On ep ranks with h = E/ep
experts each, a token then needs

    rows = ep (1 - C(E - h, K) / C(E, K))        the chance that a rank has none of its K experts, taken off, ep times

    E=8, K=2, ep=2   1.57        E=64, K=8, ep=8   5.4 instead of 8
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb, lcm

from ..config import MeshShape, MoEConfig, RunConfig
from ..layout import Layout, Placement
from ..mesh import expert_axis_of
from ..moe.placement import Order, by_number, holders, journeys, moves

Rows = Mapping[int, tuple[int, int]]  # layer -> rows that a rank sends, and receives, in one forward of a whole step
Choices = Sequence[Sequence[int]]  # of each token the slots of its experts, -1 for none
Traffic = Counter[tuple[str, str]]  # (axis, operation) -> bytes
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2}
Decided = Sequence[tuple[int, Choices]]  # what the routers of a rank decided, layer by layer


def rows_for(choices: Choices, ranks: int, held: int) -> list[int]:
    """How many rows go to each rank: of each token one to every rank that holds one of its experts."""
    out = [0] * ranks
    for slots in choices:
        for rank in {slot // held for slot in slots if slot >= 0}:
            out[rank] += 1
    return out


def rows_of_step(logs: Sequence[Decided], mesh: MeshShape, moe: MoEConfig, m: int, replicas: int = 0) -> list[Rows]:
    """The rows of every rank in one step, by rank, from what all ranks' routers decided.

    Args:
        logs: of each rank. A layer that is computed again in the backward decides again, the same.
        m: micro-batches.
        replicas: slots for copies on each rank.
    """
    held = moe.num_experts // mesh.ep + replicas
    sent, received = ([Counter[int]() for _ in logs] for _ in range(2))
    decided = [Counter(layer for layer, _ in log) for log in logs]
    for rank, log in enumerate(logs):
        members = expert_axis_of(mesh, rank, "ep").ranks
        for layer, choices in log:
            for to, rows in zip(members, rows_for(choices, mesh.ep, held), strict=True):
                sent[rank][layer] += rows
                received[to][layer] += rows
    # what was decided again counts once
    return [
        {layer: (sent[r][layer] * m // times, received[r][layer] * m // times) for layer, times in decided[r].items()}
        for r in range(len(logs))
    ]


def row_bytes(run: RunConfig) -> tuple[int, int]:
    """Bytes of a row, or of its gradient, on the way to experts and on the way back from them (`dispatch_payload`)."""
    width, itemsize = run.model.hidden_size, ITEMSIZE[run.train.dtype]
    narrow = width * min(itemsize, 2)
    plain = width * itemsize
    return {"same": (plain, plain), "bf16": (narrow, narrow), "fp8": (width + 4, narrow)}[run.train.dispatch_payload]


def migration_bytes(run: RunConfig, layout: Layout, index: Mapping[str, int], layer: int, after: Order) -> Traffic:
    """What a rank hands over when the experts of one layer are brought into a new order.

    Args:
        layout: as it is before; the rank's stage holds the layer.
    """
    train, ep = run.train, run.mesh.ep
    itemsize = ITEMSIZE[train.dtype]
    wide = itemsize if train.masters == "none" else max(itemsize, 4)  # split masters are two halves, as many bytes
    out = Counter[tuple[str, str]]()
    for name, place in layout.items():
        if not name.startswith(f"layers.{layer}.") or all(shard.axis != "ep" for shard in place.shards):
            continue
        row = place.without("ep", "edp").local_size(index) // place.kept[0]
        before = place.order or by_number(place.shape[0])
        states = 2 if train.optimizer == "adamw" and not train.freezes(name) else 0
        cut = owned_slots(place)
        leaving = sum(source == index["ep"] for _, source, _ in moves(before, after, ep))
        if not cut:
            out["ep", "all_to_all"] += leaving * row * wide * (1 + states)
            continue
        trips = journeys(holders(before, ep, cut), holders(after, ep, cut))
        owned = sum(source == index["edp"] * ep + index["ep"] for _, source, _ in trips)
        apart = train.zero == 3 or itemsize < 4  # whether the master is no part of the weight
        data = "dp" if run.mesh.cp == 1 else "dp_cp"
        out[data, "all_to_all"] += owned * row * wide * (apart + states)
        if train.zero < 3:
            out["ep", "all_to_all"] += leaving * row * itemsize
    return +out


def owned_slots(place: Placement) -> int:
    """How many of its slots each edp rank owns where ZeRO cuts them; 0 where it does not."""
    return next((shard.ranges[0][1] for shard in place.shards if shard.axis == "edp"), 0)


def replica_bytes(run: RunConfig, layout: Layout, index: Mapping[str, int]) -> Traffic:
    """What a rank hands over in a step so that copies of experts have the sum of their gradients.

    Args:
        layout: as it is in that step; those parameters count that this rank's stage holds and that are trained.
    """
    ep, wide = run.mesh.ep, max(ITEMSIZE[run.train.dtype], 4)
    out: Traffic = Counter()
    for name, place in layout.items():
        if len(place.order) == len({*place.order}) or not place.holds(index) or run.train.freezes(name):
            continue
        row = place.without("ep", "edp").local_size(index) // place.kept[0]
        cut = owned_slots(place)
        axis, me = ("dp" if run.mesh.cp == 1 else "dp_cp", index["edp"] * ep) if cut else ("ep", 0)
        held = [ranks for ranks in holders(place.order, ep, cut).values() if me + index["ep"] in ranks]
        out[axis, "replicas"] += sum(len(ranks) - 1 for ranks in held) * row * wide
    return +out


def even_rows(moe: MoEConfig, ep: int, tokens: int, replicas: int = 0) -> int:
    """Rows to expect of so many tokens of a rank, sent or received, if all sets of experts are equally likely.

    A token takes of each expert the copy whose turn it is (`moe/dispatch.py`), so each turn has a placement of its own,
    and the more experts a rank has in it, the more often a token finds two of its own there and needs one row for them.

    Args:
        replicas: slots for copies on each rank, filled by number.
    """
    experts, order = moe.num_experts, by_number(moe.num_experts, ep, replicas)
    held = len(order) // ep
    slots = [[slot for slot, each in enumerate(order) if each == expert] for expert in range(experts)]
    turns, hits = lcm(*map(len, slots)), 0.0
    for turn in range(turns):
        for here in Counter(each[turn % len(each)] // held for each in slots).values():
            hits += 1 - comb(experts - here, moe.top_k) / comb(experts, moe.top_k)
    return round(tokens * hits / turns)


def even_step(run: RunConfig) -> tuple[int, int]:
    """Rows that a rank sends, and receives, in a forward of a whole step, by `even_rows` of each exchange.

    Args:
        run: resolved; its model has experts.
    """
    train, moe = run.train, run.model.moe
    assert moe is not None
    tokens, parts = train.micro_batch_size * train.seq_len // run.mesh.cp, train.dispatch_parts
    # cut anew, not by `part_sizes`: the prediction shares no code with what it predicts
    sizes = ((i + 1) * tokens // parts - i * tokens // parts for i in range(parts))
    rows = train.micro_batches * sum(even_rows(moe, run.mesh.ep, size, train.expert_replicas) for size in sizes)
    return rows, rows
