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
from math import comb

from ..config import MeshShape, MoEConfig, RunConfig
from ..layout import Layout
from ..mesh import expert_axis_of
from ..moe.placement import Order

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


def rows_of_step(logs: Sequence[Decided], mesh: MeshShape, moe: MoEConfig, m: int) -> list[Rows]:
    """The rows of every rank in one step, by rank, from what all ranks' routers decided.

    Args:
        logs: of each rank. A layer that is computed again in the backward decides again, the same.
        m: micro-batches.
    """
    held = moe.num_experts // mesh.ep
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
        number, rest = place.shape[0], place.without("ep", "edp")
        row = rest.local_size(index) // number
        before = place.order or tuple(range(number))
        states = 2 if train.optimizer == "adamw" and not train.freezes(name) else 0
        # the owner of a slot is a pair: its place along ep, and with ZeRO along edp
        cut = next((shard.ranges[0][1] for shard in place.shards if shard.axis == "edp"), 0)
        held = number // ep
        by_ep = {slot: (slot // held, 0) for slot in range(number)}
        by_owner = {slot: (slot // held, slot % held // cut if cut else 0) for slot in range(number)}
        me = index["ep"], index["edp"] if cut else 0
        if not cut:
            out["ep", "all_to_all"] += _leaving(by_ep, me, before, after) * row * wide * (1 + states)
            continue
        apart = train.zero == 3 or itemsize < 4  # whether the master is no part of the weight
        data = "dp" if run.mesh.cp == 1 else "dp_cp"
        out[data, "all_to_all"] += _leaving(by_owner, me, before, after) * row * wide * (apart + states)
        if train.zero < 3:
            out["ep", "all_to_all"] += _leaving(by_ep, (me[0], 0), before, after) * row * itemsize
    return +out


def _leaving(owner: Mapping[int, tuple[int, int]], me: tuple[int, int], before: Order, after: Order) -> int:
    """How many experts I own before and not after."""
    mine, later = ({order[slot] for slot, who in owner.items() if who == me} for order in (before, after))
    return len(mine - later)


def even_rows(moe: MoEConfig, ep: int, tokens: int) -> int:
    """Rows to expect of so many tokens of a rank, sent or received, if all sets of experts are equally likely."""
    held = moe.num_experts // ep
    return round(tokens * ep * (1 - comb(moe.num_experts - held, moe.top_k) / comb(moe.num_experts, moe.top_k)))


def even_step(run: RunConfig) -> tuple[int, int]:
    """Rows that a rank sends, and receives, in a forward of a whole step, by `even_rows` of each exchange.

    Args:
        run: resolved; its model has experts.
    """
    train, moe = run.train, run.model.moe
    assert moe is not None
    tokens, parts = train.micro_batch_size * train.seq_len // run.mesh.cp, train.dispatch_parts
    sizes = ((i + 1) * tokens // parts - i * tokens // parts for i in range(parts))
    rows = train.micro_batches * sum(even_rows(moe, run.mesh.ep, size) for size in sizes)
    return rows, rows
