"""In which order a pipeline stage works on its micro-batches: schedules as plain data, and a clock to judge them.

Pipeline parallelism gives every stage some of the layers. A batch is cut into `m` micro-batches, so that
several of the `p` stages can be busy at once. What remains to choose is the order. A schedule is a function

    schedule(stage, stages, micro_batches) -> list[Action]        Action = (forward | backward, micro-batch)

and nothing else: no process, no tensor. `pipeline.py` executes any such list and `simulate` puts it on a clock.
The two of this file, 4 stages and 4 micro-batches, a backward costing as much as two forwards (`.` is waiting):

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

Two ideas make the bubble smaller: more and smaller stages (`schedule_interleaved.py`), and a backward in two halves,
of which one can wait (`schedule_zero_bubble.py`). `find_schedule` knows all of them by name.
"""

from __future__ import annotations

from functools import partial

from .actions import Action, Kind, Route, Schedule, route_of
from .balance import balance
from .schedule_interleaved import interleaved_1f1b
from .schedule_zero_bubble import zb_h1, zb_v
from .simulate import Event, Timeline, draw, simulate

__all__ = [
    "SCHEDULES", "Action", "Event", "Kind", "Route", "Schedule", "Timeline", "all_forward_all_backward", "balance",
    "draw", "find_schedule", "one_f_one_b", "route_of", "simulate",
]  # fmt: skip


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


# One chunk a stage and whole backwards; the others stand in `find_schedule`.
SCHEDULES: dict[str, Schedule] = {"afab": all_forward_all_backward, "1f1b": one_f_one_b}


def find_schedule(name: str, chunks: int = 2) -> Schedule:
    """The schedule that `TrainConfig.schedule` names; its route is `route_of(name, stages, chunks)`.

    Args:
        chunks: a stage, where the schedule leaves it open.
    """
    if name == "interleaved":
        return partial(interleaved_1f1b, chunks=chunks)
    return SCHEDULES[name] if name in SCHEDULES else {"zb-h1": zb_h1, "zb-v": zb_v}[name]
