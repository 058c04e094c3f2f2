"""When a stage starts to receive: an order of messages on which all stages agree, made from the schedule alone.

Messages carry no label. Whoever receives must start its receives in the order in which the other side sends. And on
NCCL a process group runs its messages one after the other: a stage that starts a receive too early blocks its own send
behind it, for which the sender of that receive may wait. On a ring of two stages:

    stage 0:  receive b from 1, then send a to 1          stage 1:  receive a from 0, then send b to 0

Nothing moves. On a line this cannot happen, since all messages of a group go one way and nothing comes back: there a
stage may receive for its next action, in its own order (`receives_in_own_order`), and the neighbours' orders agree
because all go through the micro-batches in order. But on a GPU a receive that waits may hold up its whole process: a
kernel that runs for the first time is loaded, and memory is taken, only when the GPU has nothing else to finish. Two
neighbours that each receive ahead then wait for each other on a line as well.

So training uses one order for everyone (`receives_in_one_order`): all actions of all stages by the time at which they
start on a clock, stage by stage where times are equal. A message takes the place of the action that makes it. Each
stage starts its sends and receives in this order. So of all messages that are not through, the first has both its ends
started, as soon as the actions before it have run, and those need earlier messages only: it gets through, then the
next, and nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from .actions import Action, Kind, Message, Route
from .simulate import run_clock

Receives = list[list[Message]]  # for each action of a stage, what it starts to receive before it runs


def receives_in_own_order(actions: Sequence[Action], route: Route, stage: int) -> Receives:
    """Receive for each action, and already for the next one, so that its input travels during this computation.

    The first message of a direction waits for its turn, though: NCCL may set up the connection with it, and then holds
    this process until the neighbour joins, who may need the result of this very action first.
    """
    out: Receives = []
    started: set[Message] = set()
    opened: set[str] = set()
    needs = [route.needs(stage, action) for action in actions]
    for n, mine in enumerate(needs):
        upcoming = next((message for message in needs[n + 1 :] if message is not None), None)
        opened |= {mine.kind} if mine else set()
        wanted = [m for m in (mine, upcoming) if m and m not in started and (m is mine or m.kind in opened)]
        started.update(wanted)
        out.append(wanted)
    return out


def receives_in_one_order(lists: Sequence[Sequence[Action]], route: Route) -> list[Receives]:
    """For every stage, when it starts which receive, if all stages keep to one order of messages.

    Args:
        lists: the actions of each stage.

    Raises:
        ValueError: some stage would wait for ever.
    """
    # A whole backward takes two forwards. Other costs give other orders, and any one is right.
    unit: dict[Kind, float] = {"forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}
    timeline = run_clock(lists, route, {kind: [cost] * route.length for kind, cost in unit.items()})
    out: list[Receives] = [[[] for _ in actions] for actions in lists]
    at = [0] * route.stages  # the next action of each stage
    for event in sorted(timeline.events, key=lambda event: (event.start, event.stage)):
        at[event.stage] += 1
        made = route.makes(event.stage, event.action)
        if made is not None and (to := route.ends(made)[1]) != event.stage:
            out[to][at[to]].append(made)
    return out
