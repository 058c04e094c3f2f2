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

from ..config import MeshShape, MoEConfig
from ..mesh import expert_axis_of

Rows = Mapping[int, tuple[int, int]]  # layer -> rows that a rank sends, and receives, in one forward of a whole step
Choices = Sequence[Sequence[int]]  # of each token the slots of its experts, -1 for none
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


def even_rows(moe: MoEConfig, ep: int, tokens: int) -> int:
    """Rows to expect of so many tokens of a rank, sent or received, if all sets of experts are equally likely."""
    held = moe.num_experts // ep
    return round(tokens * ep * (1 - comb(moe.num_experts - held, moe.top_k) / comb(moe.num_experts, moe.top_k)))
