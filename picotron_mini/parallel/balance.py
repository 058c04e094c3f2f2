"""Which layers a pipeline stage gets: runs of consecutive layers, so that the slowest stage is as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..config import ConfigError

ROUNDING = 1 + 1e-9  # sums that differ by less are the same sum, added up in another order


def balance(costs: Sequence[float], stages: int, first_extra: float = 0.0, last_extra: float = 0.0) -> list[range]:
    """Give each stage a run of consecutive layers so that the slowest stage is as fast as possible.

    The slowest stage sets the pace of all. The embedding on the first stage and the head with its loss on the
    last one count as well (`first_extra`, `last_extra`, in the unit of `costs`): with a large vocabulary the
    head alone can cost several layers.

    Many splits have the same slowest stage, and a step also has the way through all stages in it. Of them the evenest
    is taken, with the least sum of squared costs, and of those the one with the heaviest early stages: a heavy stage
    near the end makes all before it wait for its first backward. So 24 layers and a head of 1.33 on 8 stages are split
    4, 3, 3, 3, 3, 3, 3, 2, which takes 145.9 forwards of a layer at 8 micro-batches of 1F1B; 3, 3, 3, 3, 3, 3, 4, 2
    would take 158.0. The price is memory: early stages keep the activations of the most micro-batches.

    Exact, by dynamic programming over (stage, first layer of the stage), twice, in O(stages * layers^2).

    Raises:
        ConfigError: fewer layers than stages, or no stage at all.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ConfigError(f"pp={stages} stages do not fit {layers} layers; use 1 <= pp <= {layers}")
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, end: int) -> float:
        return before[end] - before[start] + first_extra * (stage == 0) + last_extra * (stage == stages - 1)

    def ends(stage: int, start: int) -> range:
        return range(start + 1, layers - (stages - 2 - stage))  # leave every later stage a layer

    # at [s, i], of stages s, s+1, ... when they share the layers i, i+1, ...: the least cost of the slowest of them,
    # then the least sum of squares while none is slower than the pace
    slowest = {(stages - 1, i): cost(stages - 1, i, layers) for i in range(layers)}
    for stage in reversed(range(stages - 1)):
        for i in range(stage, layers - (stages - 1 - stage)):
            slowest[stage, i] = min(max(cost(stage, i, end), slowest[stage + 1, end]) for end in ends(stage, i))
    pace = slowest[0, 0] * ROUNDING

    def squares(stage: int, start: int, end: int) -> float:
        here = cost(stage, start, end)
        return here**2 + (least[stage + 1, end] if stage < stages - 1 else 0.0) if here <= pace else float("inf")

    least: dict[tuple[int, int], float] = {}
    for stage in reversed(range(stages)):
        for i in range(stage, layers - (stages - 1 - stage)):
            least[stage, i] = min(
                squares(stage, i, end) for end in (ends(stage, i) if stage < stages - 1 else [layers])
            )

    split, start = [], 0
    for stage in range(stages - 1):
        best = least[stage, start] * ROUNDING
        end = max(end for end in ends(stage, start) if squares(stage, start, end) <= best)
        split.append(range(start, end))
        start = end
    return [*split, range(start, layers)]
