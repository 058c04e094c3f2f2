"""Which layers a pipeline stage gets: runs of consecutive layers, so that the slowest stage is as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..config import ConfigError


def balance(costs: Sequence[float], stages: int, first_extra: float = 0.0, last_extra: float = 0.0) -> list[range]:
    """Give each stage a run of consecutive layers so that the slowest stage is as fast as possible.

    The slowest stage sets the pace of all. The embedding on the first stage and the head with its loss on the
    last one count as well (`first_extra`, `last_extra`, in the unit of `costs`): with a large vocabulary the
    head alone can cost several layers. Exact, by dynamic programming over (stage, first layer of the stage),
    in O(stages * layers^2). Among splits with the same slowest stage, early stages get the fewest layers: under
    1F1B they hold the activations of the most micro-batches.

    The pace is all that is minimised. A step of few micro-batches also has the way through all stages in it, which
    evener splits with the same slowest stage may make shorter: 24 layers and a head of 1.33 on 8 stages give 1, 1, 4,
    4, 4, 4, 4, 2, which takes 158.0 forwards of a layer at 8 micro-batches, and 4, 3, 3, 3, 3, 3, 3, 2 takes 145.9.

    Raises:
        ConfigError: fewer layers than stages, or no stage at all.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ConfigError(f"pp={stages} stages do not fit {layers} layers; use 1 <= pp <= {layers}")
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, end: int) -> float:
        return before[end] - before[start] + first_extra * (stage == 0) + last_extra * (stage == stages - 1)

    # best[s, i]: the least possible cost of the slowest of stages s, s+1, ... when they share the layers i, i+1, ...
    best: dict[tuple[int, int], float] = {(stages - 1, i): cost(stages - 1, i, layers) for i in range(layers)}
    for stage in reversed(range(stages - 1)):
        for start in range(stage, layers - (stages - 1 - stage)):
            ends = range(start + 1, layers - (stages - 2 - stage))  # leave every later stage a layer
            best[stage, start] = min(max(cost(stage, start, end), best[stage + 1, end]) for end in ends)

    split, start = [], 0
    for stage in range(stages - 1):
        end = start + 1
        while max(cost(stage, start, end), best[stage + 1, end]) > best[0, 0]:
            end += 1
        split.append(range(start, end))
        start = end
    return [*split, range(start, layers)]
