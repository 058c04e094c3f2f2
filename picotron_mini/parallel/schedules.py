"""In which order a pipeline stage works on its micro-batches: schedules as plain data, and a clock to judge them.

Pipeline parallelism gives every stage some of the layers. A batch is cut into `m` micro-batches, so that
several of the `p` stages can be busy at once. What remains to choose is the order. A schedule is a function

    schedule(stage, stages, micro_batches) -> list[Action]        Action = (forward | backward, micro-batch)

and nothing else: no process, no tensor. `pipeline.py` executes any such list and `simulate` puts it on a clock.
Both schedules below, 4 stages and 4 micro-batches, a backward costing as much as two forwards (`.` is waiting):

    afab, all forward and then all backward (GPipe, arXiv 1811.06965)
    stage 0  F0 F1 F2 F3 .. .. .. .. .. .. .. .. .. B0=== B1=== B2=== B3===
    stage 1  .. F0 F1 F2 F3 .. .. .. .. .. .. B0=== B1=== B2=== B3=== .. ..
    stage 2  .. .. F0 F1 F2 F3 .. .. .. B0=== B1=== B2=== B3=== .. .. .. ..
    stage 3  .. .. .. F0 F1 F2 F3 B0=== B1=== B2=== B3=== .. .. .. .. .. ..

    1f1b, one forward, one backward (PipeDream-flush, arXiv 2006.09503; used at scale in arXiv 2104.04473)
    stage 0  F0 F1 F2 F3 .. .. .. .. .. .. B0=== .. B1=== .. B2=== .. B3===
    stage 1  .. F0 F1 F2 .. .. .. .. B0=== F3 B1=== .. B2=== .. B3=== .. ..
    stage 2  .. .. F0 F1 .. .. B0=== F2 B1=== F3 B2=== .. B3=== .. .. .. ..
    stage 3  .. .. .. F0 B0=== F1 B1=== F2 B2=== F3 B3=== .. .. .. .. .. ..

Time. With equal stages each stage works m*(f + b) and both schedules last (m + p - 1)*(f + b). The idle share,
the *bubble*, is therefore (p - 1) / (m + p - 1) in both: it shrinks only with more micro-batches.

Memory. A stage keeps the activations of a micro-batch from its forward to its backward. All-forward-all-backward
keeps all `m`. 1F1B runs a backward as soon as there is one, and keeps at most min(p - stage, m): the same speed,
and memory that does not grow with `m`. On one stage it reads F0 B0 F1 B1 ..., which is gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from ..config import ConfigError

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Action:
    """One thing that a stage does: the forward or the backward of one micro-batch."""

    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind[0].upper()}{self.micro_batch}"


Schedule = Callable[[int, int, int], list[Action]]


def all_forward_all_backward(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """GPipe: every forward, then every backward. Each stage keeps the activations of all micro-batches."""
    return [Action(kind, m) for kind in ("forward", "backward") for m in range(micro_batches)]


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """PipeDream-flush: as many forwards as there are stages below, then alternate, then the backwards left over."""
    warm_up = min(stages - 1 - stage, micro_batches)
    actions = [Action("forward", m) for m in range(warm_up)]
    for m in range(micro_batches - warm_up):
        actions += [Action("forward", warm_up + m), Action("backward", m)]
    return actions + [Action("backward", m) for m in range(micro_batches - warm_up, micro_batches)]


SCHEDULES: dict[str, Schedule] = {"afab": all_forward_all_backward, "1f1b": one_f_one_b}


class Event(NamedTuple):
    """An action on the clock of `simulate`; times are in the unit of the costs."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every stage did when: `events` sorted by stage, then by time."""

    events: tuple[Event, ...]

    @property
    def stages(self) -> int:
        return 1 + max(event.stage for event in self.events)

    @property
    def total(self) -> float:
        """The time from the first start to the last end."""
        return max(event.end for event in self.events)

    @property
    def bubble(self) -> float:
        """The share of all stages' time that is spent waiting, 0 to 1."""
        return 1 - sum(event.end - event.start for event in self.events) / (self.stages * self.total)

    @property
    def peak_live(self) -> tuple[int, ...]:
        """For each stage, the most micro-batches whose activations it holds at once."""
        peaks = []
        for stage in range(self.stages):
            steps = [1 if e.action.kind == "forward" else -1 for e in self.events if e.stage == stage]
            peaks.append(max(accumulate(steps)))
        return tuple(peaks)


def simulate(
    schedule: Schedule,
    stages: int,
    micro_batches: int,
    forward_cost: float | Sequence[float] = 1.0,
    backward_cost: float | Sequence[float] = 2.0,
    send_cost: float = 0.0,
) -> Timeline:
    """Run a schedule on a clock: an action starts once its stage is free and its input has arrived.

    Args:
        forward_cost, backward_cost: the time of one micro-batch, the same on all stages or one number a stage.
        send_cost: the time an activation or a gradient is on its way; sending does not keep a stage busy.

    Raises:
        ValueError: the schedule cannot finish (some stage waits for ever), or a stage repeats or forgets an action.
    """
    if min(stages, micro_batches) < 1:
        raise ConfigError(f"{stages} stages and {micro_batches} micro-batches: there must be at least one of each")
    costs = {"forward": _per_stage(forward_cost, stages), "backward": _per_stage(backward_cost, stages)}
    waiting = [schedule(stage, stages, micro_batches) for stage in range(stages)]
    for stage, actions in enumerate(waiting):
        if sorted(map(str, actions)) != sorted(f"{kind}{m}" for kind in "FB" for m in range(micro_batches)):
            raise ValueError(f"stage {stage} must run every action once, and runs {' '.join(map(str, actions))}")

    free = [0.0] * stages  # when each stage has finished what it was given
    ends: dict[tuple[int, Action], float] = {}  # (stage, action) that has run -> when it ended
    events: list[Event] = []
    progress = True
    while progress:
        progress = False
        for stage, actions in enumerate(waiting):
            while actions and (ready := _ready(stage, actions[0], stages, ends, send_cost)) is not None:
                action, start = actions.pop(0), max(free[stage], ready)
                free[stage] = ends[stage, action] = start + costs[action.kind][stage]
                events.append(Event(stage, action, start, free[stage]))
                progress = True
    if any(waiting):
        stuck = "; ".join(f"stage {s} waits for the input of {a[0]}" for s, a in enumerate(waiting) if a)
        raise ValueError(f"the schedule deadlocks: {stuck}")
    return Timeline(tuple(sorted(events, key=lambda event: (event.stage, event.start))))


def _ready(
    stage: int, action: Action, stages: int, ends: dict[tuple[int, Action], float], send_cost: float
) -> float | None:
    """When the input of an action has arrived; `None` while what it needs has not run."""
    forward = Action("forward", action.micro_batch)
    if action.kind == "backward" and (stage, forward) not in ends:
        return None  # a backward needs the activations of its own forward, whatever its neighbour has sent
    source = stage - 1 if action.kind == "forward" else stage + 1
    if source in (-1, stages):
        return 0.0  # tokens are at hand, and the last stage has the loss itself
    return ends[source, action] + send_cost if (source, action) in ends else None


def _per_stage(cost: float | Sequence[float], stages: int) -> list[float]:
    costs = [float(cost)] * stages if isinstance(cost, int | float) else list(cost)
    if len(costs) != stages or min(costs) <= 0:
        raise ConfigError(f"costs {cost} must be above 0, one number or one for each of {stages} stages")
    return costs


def draw(timeline: Timeline) -> str:
    """The timeline as text, one line a stage: `F0` a forward, `B0===` a backward, `..` waiting.

    One column is as long as the shortest action, so other times are rounded to whole columns.
    """
    column = min(event.end - event.start for event in timeline.events)
    width = 1 + max(len(str(event.action)) for event in timeline.events)
    lines = []
    for stage in range(timeline.stages):
        cells, now = [], 0
        for event in [e for e in timeline.events if e.stage == stage]:
            start, end = round(event.start / column), round(event.end / column)
            cells += ["." * (width - 1)] * (start - now)
            cells.append(str(event.action).ljust(width * (end - start) - 1, "="))
            now = end
        cells += ["." * (width - 1)] * (round(timeline.total / column) - now)
        lines.append(f"stage {stage}  " + " ".join(cells))
    return "\n".join(lines)


def balance(costs: Sequence[float], stages: int, first_extra: float = 0.0, last_extra: float = 0.0) -> list[range]:
    """Give each stage a run of consecutive layers so that the slowest stage is as fast as possible.

    The slowest stage sets the pace of all. The embedding on the first stage and the head with its loss on the
    last one count as well (`first_extra`, `last_extra`, in the unit of `costs`): with a large vocabulary the
    head alone can cost several layers. Exact, by dynamic programming over (stage, first layer of the stage),
    in O(stages * layers^2). Among equally fast splits, early stages get the fewest layers: under 1F1B they
    hold the activations of the most micro-batches.

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
