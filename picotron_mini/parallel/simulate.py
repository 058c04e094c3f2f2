"""A clock for schedules: when does each stage do what, how long does it wait, how much does it keep?

    simulate(schedule, stages, micro_batches, costs) -> Timeline          draw(timeline) -> text

An action starts once its stage is free and what it needs has arrived: a forward the hidden states of the virtual stage
before it, a backward its own forward and the gradient of the virtual stage after it, a W its own I. Nothing is
computed, so a schedule can be judged for thousands of sizes, and one that deadlocks is found before a rank waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from ..config import ConfigError
from .actions import LETTERS, Action, Kind, Message, Route, Schedule

Cost = float | Sequence[float]


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
        """For each stage, the most chunks of micro-batches whose activations it holds at once: from F to B, or to W."""
        peaks = []
        for stage in range(self.stages):
            mine = [event.action.kind for event in self.events if event.stage == stage]
            steps = {"forward": 1, "backward": -1, "backward_input": 0, "backward_weight": -1}
            peaks.append(max(accumulate(steps[kind] for kind in mine)))
        return tuple(peaks)


def simulate(
    schedule: Schedule,
    stages: int,
    micro_batches: int,
    forward_cost: Cost = 1.0,
    backward_cost: Cost = 2.0,
    send_cost: float = 0.0,
    weight_share: float = 0.5,
    route: Route | None = None,
) -> Timeline:
    """Run a schedule on a clock: an action starts once its stage is free and its input has arrived.

    Args:
        forward_cost, backward_cost: the time of one micro-batch in one chunk; one number, or one a virtual stage in the
            order of the route (without a route, one a stage).
        send_cost: the time an activation or a gradient is on its way between stages; it keeps no stage busy.
        weight_share: of a backward's time that W takes, where it is split; I takes the rest.
        route: where the virtual stages are; None: one a stage.

    Raises:
        ValueError: the schedule cannot finish (some stage waits for ever), or a stage repeats or forgets an action.
    """
    if min(stages, micro_batches) < 1:
        raise ConfigError(f"{stages} stages and {micro_batches} micro-batches: there must be at least one of each")
    route = route or Route(stages)
    forwards, backwards = (_per_stage(cost, route.length) for cost in (forward_cost, backward_cost))
    costs: dict[Kind, list[float]] = {
        "forward": forwards,
        "backward": backwards,
        "backward_input": [cost * (1 - weight_share) for cost in backwards],
        "backward_weight": [cost * weight_share for cost in backwards],
    }
    lists = [schedule(stage, stages, micro_batches) for stage in range(stages)]
    for stage, actions in enumerate(lists):
        if not _each_once(actions, micro_batches, route.chunks):
            where = "" if route.chunks == 1 else f" in each of {route.chunks} chunks"
            raise ValueError(f"stage {stage} must run every action once{where}, and runs {' '.join(map(str, actions))}")
    return run_clock(lists, route, costs, send_cost)


def run_clock(
    lists: Sequence[Sequence[Action]], route: Route, costs: Mapping[Kind, Sequence[float]], send_cost: float = 0.0
) -> Timeline:
    """As `simulate`, of any lists of actions, one a stage.

    Args:
        costs: of each kind, by virtual stage.

    Raises:
        ValueError: some stage waits for ever.
    """
    waiting = [list(actions) for actions in lists]
    free = [0.0] * route.stages  # when each stage has finished what it was given
    arrived: dict[Message, float] = {}  # when a message is where it is needed
    ends: dict[tuple[int, Action], float] = {}  # (stage, action) that has run -> when it ended
    events: list[Event] = []
    progress = True
    while progress:
        progress = False
        for stage, actions in enumerate(waiting):
            while actions and (ready := _ready(stage, actions[0], route, arrived, ends)) is not None:
                action, start = actions.pop(0), max(free[stage], ready)
                end = start + costs[action.kind][route.position(stage, action.chunk)]
                free[stage] = ends[stage, action] = end
                if (made := route.makes(stage, action)) is not None:
                    source, to = route.ends(made)
                    arrived[made] = end + send_cost * (source != to)
                events.append(Event(stage, action, start, end))
                progress = True
    if any(waiting):
        stuck = "; ".join(f"stage {s} waits for the input of {a[0]}" for s, a in enumerate(waiting) if a)
        raise ValueError(f"the schedule deadlocks: {stuck}")
    return Timeline(tuple(sorted(events, key=lambda event: (event.stage, event.start))))


def _ready(
    stage: int, action: Action, route: Route, arrived: Mapping[Message, float], ends: Mapping[tuple[int, Action], float]
) -> float | None:
    """When the input of an action has arrived; `None` while what it needs has not run."""
    before: Kind | None = None
    if action.kind != "forward":  # whatever its neighbour has sent, it needs what its own stage keeps for it
        before = "backward_input" if action.kind == "backward_weight" else "forward"
    if before is not None and (stage, Action(before, action.micro_batch, action.chunk)) not in ends:
        return None
    message = route.needs(stage, action)
    return 0.0 if message is None else arrived.get(message)


def _each_once(actions: Sequence[Action], micro_batches: int, chunks: int) -> bool:
    """Whether each chunk runs each micro-batch's F once, and its B once or its I and W."""
    wanted = Counter((m, chunk) for m in range(micro_batches) for chunk in range(chunks))
    found = {kind: Counter((a.micro_batch, a.chunk) for a in actions if a.kind == kind) for kind in LETTERS}
    split = found["backward_input"]
    return found["forward"] == found["backward"] + split == wanted and split == found["backward_weight"]


def _per_stage(cost: Cost, stages: int) -> list[float]:
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
            cells.append(str(event.action).ljust(width * (end - start) - 1, "=" if end - start > 1 else " "))
            now = end
        cells += ["." * (width - 1)] * (round(timeline.total / column) - now)
        lines.append(f"stage {stage}  " + " ".join(cells).rstrip())
    return "\n".join(lines)
