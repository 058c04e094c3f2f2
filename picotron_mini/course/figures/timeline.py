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

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, Variable

from ...parallel.schedules import Action, Event, Timeline
from .picture import GREY, INK, PALE, Picture

Forward = Callable[[int, Tensor | None], Tensor]
COLOURS = {"forward": PALE[0], "backward": PALE[1], "backward_input": PALE[4], "backward_weight": PALE[2]}
NAMES = {"forward": "forward", "backward": "backward", "backward_input": "backward, input (I)",
         "backward_weight": "backward, weights (W)"}  # fmt: skip
LEFT, WIDTH, RIGHT, ROW = 60, 680, 12, 18  # pixels of a picture: the stages' names, all, room for a tick, one stage


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


def draw_timelines(timelines: Mapping[str, Timeline], words: str, unit: str) -> Picture:
    """Timelines below each other on one clock, a row a stage: a colour for each kind of action, none for waiting.

    Written as SVG by hand: with a few hundred boxes a plotting library's file is ten times as large.

    Args:
        timelines: title -> timeline.
        words: what the picture shows, for those who do not see it.
        unit: of the times.
    """
    scale = (WIDTH - LEFT) / max(timeline.total for timeline in timelines.values())
    boxes: dict[str, list[str]] = {kind: [] for kind in COLOURS}
    numbers, labels, lines = [], [], []
    events = [event for timeline in timelines.values() for event in timeline.events]
    x, y = float(LEFT), 14.0
    for kind in (kind for kind in COLOURS if any(event.action.kind == kind for event in events)):
        boxes[kind].append(f'<rect x="{x:g}" y="1" width="14" height="10"/>')
        labels.append(f'<text x="{x + 19:g}" y="10">{NAMES[kind]}</text>')
        x += 40 + 6.2 * len(NAMES[kind])
    numbered = "a number is a micro-batch" + (", 0' in a second chunk" if any(e.action.chunk for e in events) else "")
    for title, timeline in timelines.items():
        y += 20
        labels.append(f'<text x="{LEFT}" y="{y - 6:g}">{title}: {100 * timeline.bubble:.0f} % idle</text>')
        for stage, action, start, end in timeline.events:
            x, width, top = LEFT + start * scale, (end - start) * scale, y + ROW * stage
            boxes[action.kind].append(f'<rect x="{x:.1f}" y="{top:g}" width="{width:.1f}" height="{ROW - 2}"/>')
            number = f"{action.micro_batch}{chr(39) * action.chunk}"
            if width > 6 * len(str(action.micro_batch)) + 2 * action.chunk:  # the number fits
                numbers.append(f'<text x="{x + width / 2:.1f}" y="{top + 12:g}">{number}</text>')
        for stage in range(timeline.stages):
            x, top = LEFT - 6, y + ROW * stage + 12
            labels.append(f'<text x="{x}" y="{top:g}" text-anchor="end">stage {stage}</text>')
        y += ROW * timeline.stages
    lines.append(f'<path d="M{LEFT} {y + 2:g}H{WIDTH}"/>')
    for tick in _ticks((WIDTH - LEFT) / scale):
        x = LEFT + tick * scale
        lines.append(f'<path d="M{x:.1f} {y + 2:g}v4"/>')
        labels.append(f'<text x="{x:.1f}" y="{y + 17:g}" text-anchor="middle">{tick:g}</text>')
    labels.append(f'<text x="{(LEFT + WIDTH) / 2:g}" y="{y + 31:g}" text-anchor="middle">{unit}; {numbered}</text>')
    size = f'width="{WIDTH + RIGHT}" height="{y + 36:g}" viewBox="0 0 {WIDTH + RIGHT} {y + 36:g}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    for kind, found in boxes.items():
        if found:
            parts.append(f'<g fill="{COLOURS[kind]}" stroke="{GREY}" stroke-width="0.5">{"".join(found)}</g>')
    parts.append(f'<g fill="{INK}" font-size="9" text-anchor="middle">{"".join(numbers)}</g>')
    parts.append(f'<g fill="{GREY}">{"".join(labels)}</g><g stroke="{GREY}">{"".join(lines)}</g></svg>')
    return Picture("\n".join(parts), words)


def _ticks(longest: float) -> list[float]:
    """At most eight round numbers from 0 to `longest`."""
    power = 10.0 ** math.floor(math.log10(longest / 7))
    step = next(power * factor for factor in (1, 2, 5, 10) if longest / (power * factor) <= 7)
    return [step * number for number in range(math.floor(longest / step) + 1)]
