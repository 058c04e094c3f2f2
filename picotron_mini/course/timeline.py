"""What a pipeline really did, on the clock of what was simulated, and both as pictures.

`simulate` returns a `Timeline`. Here a run on real ranks becomes one as well, so that its bubble and its live
micro-batches are computed by the same lines, and the same function draws it:

    events = []                                         on every rank
    run_pipeline(actions, forward=timed(forward, stage, events), ...)
    draw_timelines({"simulated": simulate(...), "real": merge(events of every rank)}, ...)

Nothing in the executor is changed for it. The forward is wrapped. The backward begins when autograd reaches the
node that made the stage's output, and ends when autograd has nothing left to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, Variable

from ..parallel.schedules import Action, Event, Timeline
from .picture import GREY, INK, PALE, Picture, drawing, figure, picture

Forward = Callable[[int, Tensor | None], Tensor]
COLOURS = {"forward": PALE[0], "backward": PALE[1]}


def timed(forward: Forward, stage: int, events: list[Event]) -> Forward:
    """The same stage, which notes when each forward and each backward starts and ends.

    Args:
        forward: as `run_pipeline` takes it.
        events: gets one `Event` for each action, in seconds of a clock that all ranks of one machine share. Waiting
            for a message is in none of them.
    """

    def wrapped(m: int, hidden: Tensor | None) -> Tensor:
        start = time.perf_counter()
        output = forward(m, hidden)
        events.append(Event(stage, Action("forward", m), start, time.perf_counter()))

        def begin(_: object) -> None:
            began = time.perf_counter()
            # what DDP, too, calls when a whole backward pass is over
            Variable._execution_engine.queue_callback(
                lambda: events.append(Event(stage, Action("backward", m), began, time.perf_counter()))
            )

        if output.grad_fn is not None:
            output.grad_fn.register_prehook(begin)
        return output

    return wrapped


def merge(per_rank: Sequence[Sequence[Event]]) -> Timeline:
    """The events of all ranks as one timeline, in seconds since the first of them started."""
    zero = min(event.start for event in chain(*per_rank))
    moved = [event._replace(start=event.start - zero, end=event.end - zero) for event in chain(*per_rank)]
    return Timeline(tuple(sorted(moved, key=lambda event: (event.stage, event.start))))


class _Pretend(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_seconds: float, backward_seconds: float) -> Tensor:
        ctx.seconds = backward_seconds
        time.sleep(forward_seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


def pretend(x: Tensor, forward_seconds: float, backward_seconds: float) -> Tensor:
    """x itself, after a sleep; its gradient too takes its time. Stands for a layer where there are too few cores."""
    return torch.as_tensor(_Pretend.apply(x, forward_seconds, backward_seconds))


def draw_timelines(timelines: Mapping[str, Timeline], words: str, unit: str = "", same_clock: bool = False) -> Picture:
    """Timelines below each other, one row a stage: blue forwards, orange backwards, nothing where a stage waits.

    Args:
        timelines: title -> timeline.
        words: what the picture shows, for those who do not see it.
        unit: of the time axis; no axis without.
        same_clock: draw all on one time axis; else each fills the width.
    """
    heights = [timeline.stages for timeline in timelines.values()]
    with drawing():
        fig = figure(7.2, sum(0.27 * height + 0.5 for height in heights))
        panels = fig.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        longest = max(timeline.total for timeline in timelines.values())
        for axes, (title, timeline) in zip(panels, timelines.items(), strict=True):
            _rows(axes, timeline)
            axes.set_xlim(0, longest if same_clock else timeline.total)
            axes.set_title(f"{title}: {100 * timeline.bubble:.0f} % idle", loc="left", fontsize=9)
            if unit:
                axes.set_xlabel(unit)
            else:
                axes.set_xticks([])
                axes.spines["bottom"].set_visible(False)
    return picture(fig, words)


def _rows(axes: Any, timeline: Timeline) -> None:
    from matplotlib.patches import Rectangle

    for stage, action, start, end in timeline.events:
        box = Rectangle((start, stage + 0.06), end - start, 0.88, facecolor=COLOURS[action.kind], edgecolor=GREY)
        box.set_linewidth(0.4)
        axes.add_patch(box)
        if end - start > 0.012 * timeline.total:
            axes.text((start + end) / 2, stage + 0.52, str(action.micro_batch), ha="center", va="center", color=INK)
            axes.texts[-1].set_fontsize(7)
    axes.set_ylim(timeline.stages, 0)
    axes.set_yticks([stage + 0.5 for stage in range(timeline.stages)], [f"stage {s}" for s in range(timeline.stages)])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
