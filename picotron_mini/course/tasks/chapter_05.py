"""Exercises of chapter 05, pipeline parallelism: in which order a stage works, and what an order costs.

An answer is a schedule: a function that returns data. So it can be put on a clock for many sizes before it is run on
real stages, where autograd tells how many bytes they keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...config import MeshShape
from ...launch import launch
from ...mesh import Mesh
from ...parallel.pipeline import run_pipeline
from ...parallel.schedules import Action, Schedule, all_forward_all_backward, one_f_one_b, simulate
from ..exercises import Exercise, Mistake, NotAttempted
from ..instruments.saved import SavedBytes

Answer = Callable[..., Any]
SIZES = [(stages, micro_batches) for stages in range(1, 6) for micro_batches in (1, 2, 3, 4, 7, 8)]


def _once(stage: int, stages: int, micro_batches: int) -> str:
    return (
        f"with {stages} stages and {micro_batches} micro-batches an action of stage {stage} is missing or repeated; "
        "each stage must run the forward and the backward of every micro-batch once"
    )


_PLAIN = (
    'the list holds {!r}, and the executor knows Action("forward", m) and Action("backward", m) only; Action is in '
    "picotron_mini.parallel.schedules"
)
ORDER = (
    "messages carry no label: the neighbours take the micro-batches in ascending order, forward and backward, and "
    "would hold one micro-batch's gradient for another's"
)
DEADLOCK = (
    "the stages wait for each other for ever: a stage does not send the forward that the next one needs for the "
    "backward that the first one waits for. How many forwards must run before the first backward can arrive?"
)


def _schedule_problem(answer: Schedule) -> str | None:
    """What is wrong with a schedule at any clock; None if it runs."""
    for stages, micro_batches in SIZES:
        for stage in range(stages):
            actions = answer(stage, stages, micro_batches)
            if plain := [action for action in actions if not isinstance(action, Action)]:
                return _PLAIN.format(plain[0])
            if sorted(map(str, actions)) != sorted(f"{kind}{m}" for kind in "FB" for m in range(micro_batches)):
                return _once(stage, stages, micro_batches)
            for kind in ("forward", "backward"):
                if [a.micro_batch for a in actions if a.kind == kind] != list(range(micro_batches)):
                    return ORDER
        try:
            simulate(answer, stages, micro_batches)
        except ValueError:
            return DEADLOCK
    return None


def _with_warm_up(forwards: Callable[[int, int], int]) -> Schedule:
    """First `forwards(stage, stages)` forwards, then one of each in turn, then the backwards left over."""

    def schedule(stage: int, stages: int, micro_batches: int) -> list[Action]:
        warm_up = min(forwards(stage, stages), micro_batches)
        actions = [Action("forward", m) for m in range(warm_up)]
        for m in range(micro_batches - warm_up):
            actions += [Action("forward", warm_up + m), Action("backward", m)]
        return actions + [Action("backward", m) for m in range(micro_batches - warm_up, micro_batches)]

    return schedule


# --- 1: one forward, one backward -------------------------------------------------------------------------


def one_f_one_b_stub(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """The actions of one stage: as fast as all-forward-all-backward, and never more than stages - stage live.

    Args:
        stage: 0 to stages - 1. A backward costs two forwards, messages nothing.

    Returns:
        `Action("forward", m)` and `Action("backward", m)`, in order.
    """
    raise NotAttempted


_SLOW = "right, and slow: the first stage waits for its backward before it starts the next forward, and all others rest"
_LIVE = (
    "right, and not lean: a stage holds more than stages - stage micro-batches. Warm up with as many forwards as there "
    "are stages behind it, no more, and then alternate: a forward, a backward"
)


def _stack(stage: int, stages: int, micro_batches: int) -> list[Action]:
    forwards = [Action("forward", m) for m in range(micro_batches)]
    return forwards + [Action("backward", m) for m in reversed(range(micro_batches))]


def _tuples(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    return [(action.kind, action.micro_batch) for action in one_f_one_b(stage, stages, micro_batches)]


def _no_cool_down(stage: int, stages: int, micro_batches: int) -> list[Action]:
    actions = one_f_one_b(stage, stages, micro_batches)
    return actions[: len(actions) - min(stages - 1 - stage, micro_batches)]


def _run_one_f_one_b(answer: Answer) -> str | None:
    if problem := _schedule_problem(answer):
        return problem
    for stages, micro_batches in SIZES:
        timeline = simulate(answer, stages, micro_batches)
        if timeline.total > 3 * (micro_batches + stages - 1):
            return _SLOW
        if any(live > min(stages - stage, micro_batches) for stage, live in enumerate(timeline.peak_live)):
            return _LIVE
    return None


# --- 2: how many micro-batches ----------------------------------------------------------------------------


def micro_batches_stub(stages: int, percent: int) -> int:
    """The smallest number of micro-batches with which the stages idle at most `percent` % of the time.

    Args:
        stages: 1 or more. One stage never idles, and a step has at least one micro-batch.
        percent: 1 to 99.
    """
    raise NotAttempted


def micro_batches(stages: int, percent: int) -> int:
    """(p - 1) / (m + p - 1) <= b, solved for m: m >= (p - 1) (1 - b) / b."""
    return max(1, math.ceil((stages - 1) * (100 - percent) / percent))


_COUNTS: dict[str, tuple[Callable[[int, int], int], str]] = {
    "share of the work": (
        lambda stages, percent: max(1, math.ceil((stages - 1) * 100 / percent)),
        "(p - 1) / m is the idle time over the *working* time; the share of the whole time is (p - 1) / (m + p - 1)",
    ),
    "as many as stages": (
        lambda stages, percent: max(1, math.ceil(stages * (100 - percent) / percent)),
        "only p - 1 stages must be filled before the last one works: p stages idle for p - 1 steps",
    ),
    "rounded down": (
        lambda stages, percent: max(1, (stages - 1) * (100 - percent) // percent),
        "rounded down, this idles a little more than it may",
    ),
    "always one more": (
        lambda stages, percent: (stages - 1) * (100 - percent) // percent + 1,
        "where the division leaves nothing, one micro-batch fewer idles exactly that much, and that is allowed",
    ),
}
_ASKED = [(stages, percent) for stages in (2, 3, 4, 8) for percent in (5, 10, 15, 20, 30, 50, 60)]
_ROUNDED = (
    "right but for rounding: where the division leaves nothing, fractions in floating point leave some 1e-15, and "
    "rounding up makes one more of it (1 - 0.2 over 0.2 is not quite 4). Count in whole percents: 100 - percent"
)
_ONE_STAGE = "right but for pp=1: one stage never idles, the formula says 0, and a step has at least 1 micro-batch"


def _in_fractions(stages: int, percent: int) -> int:
    share = percent / 100
    return max(1, math.ceil((stages - 1) * (1 - share) / share))


def _no_least(stages: int, percent: int) -> int:
    return math.ceil((stages - 1) * (100 - percent) / percent)


def _run_micro_batches(answer: Answer) -> str | None:
    got = [answer(*asked) for asked in _ASKED]
    for wrong, hint in _COUNTS.values():
        if [max(1, m) for m in got] == [wrong(*asked) for asked in _ASKED]:
            return hint
    off = {(m - micro_batches(*asked), (asked[0] - 1) * 100 % asked[1]) for asked, m in zip(_ASKED, got, strict=True)}
    if {error for error in off if error[0]} == {(1, 0)}:
        return _ROUNDED
    for (stages, percent), m in zip(_ASKED, got, strict=True):
        if not isinstance(m, int) or m < 1:
            return f"for pp={stages} and {percent} % the answer is {m!r}; it must be an int of 1 or more"
        idle = 100 * simulate(one_f_one_b, stages, m).bubble
        if idle > percent + 1e-9:
            return f"pp={stages} with {m} micro-batches idles {idle:.1f} % of the time, more than {percent} %"
        if m > 1 and 100 * simulate(one_f_one_b, stages, m - 1).bubble < percent + 1e-9:
            return f"pp={stages} stays within {percent} % with {m - 1} micro-batches; {m} are more than it needs"
    if answer(1, 20) != 1:
        return _ONE_STAGE
    return None


# --- 3: slow links, within a budget -----------------------------------------------------------------------


def slow_links_stub(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """A schedule for links on which a message travels for half as long as a forward and a backward take.

    As fast as all-forward-all-backward. Budget: on real stages a stage keeps at most the activations of
    2 (stages - 1 - stage) + 1 micro-batches, counted in bytes.
    """
    raise NotAttempted


slow_links = _with_warm_up(lambda stage, stages: 2 * (stages - 1 - stage))
STAGES, MICRO_BATCHES = 3, 8
_TOO_SLOW = (
    "this waits for messages. A micro-batch's way to the last stage and back takes longer than the stage has other "
    "forwards to run; give it more of them"
)


def _over_budget(stage: int, kept: int) -> str:
    allowed = 2 * (STAGES - 1 - stage) + 1
    return (
        f"right and fast, and stage {stage} of {STAGES} kept the activations of {kept} micro-batches at once; the "
        f"budget is {allowed}"
    )


def _kept_on_rank(answer: Schedule) -> tuple[int, int]:
    """The bytes that one micro-batch keeps, and the most that `answer` keeps, on a real stage."""
    mesh = Mesh.build(MeshShape(pp=STAGES))
    pp, peaks = mesh["pp"], []
    for schedule, m in ((one_f_one_b, 1), (answer, MICRO_BATCHES)):
        weight = torch.ones(5, requires_grad=True)
        saved = SavedBytes([weight])

        def forward(number: int, hidden: Tensor | None, weight: Tensor = weight, saved: SavedBytes = saved) -> Tensor:
            with saved.watching():
                out = torch.tanh((torch.full((4, 5), 0.1 * number + 0.1) if hidden is None else hidden) * weight)
                return out.square().sum() if pp.index == STAGES - 1 else out

        run_pipeline(
            schedule(pp.index, STAGES, m), forward=forward, axis=pp, gradient_axis=mesh["pp.backward"], shape=(4, 5),
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        peaks.append(saved.peak)
    return peaks[0], peaks[1]


def _run_slow_links(answer: Answer) -> str | None:
    if problem := _schedule_problem(answer):
        return problem
    for size in SIZES:
        if (
            simulate(answer, *size, send_cost=1.5).total
            > simulate(all_forward_all_backward, *size, send_cost=1.5).total
        ):
            return _TOO_SLOW
    for stage, (one, peak) in enumerate(launch(_kept_on_rank, answer, world_size=STAGES, timeout=60, output="hide")):
        if peak > (2 * (STAGES - 1 - stage) + 1) * one:
            return _over_budget(stage, peak // one)
    return None


EXERCISES = [
    Exercise(
        id="05.one_f_one_b",
        title="One forward, one backward",
        task="Write the schedule 1F1B for one stage: as fast as all-forward-all-backward, and with at most "
        "stages - stage micro-batches alive. It is simulated for 30 sizes.",
        stub=one_f_one_b_stub,
        reference=one_f_one_b,
        mistakes=(
            Mistake("all forward, all backward", all_forward_all_backward, _LIVE),
            Mistake("the same warm-up everywhere", _with_warm_up(lambda stage, stages: stages - 1), _LIVE),
            Mistake("one warm-up more", _with_warm_up(lambda stage, stages: stages - stage), _LIVE),
            Mistake("no warm-up", _with_warm_up(lambda stage, stages: 0), _SLOW),
            Mistake("upside down", _with_warm_up(lambda stage, stages: stage), DEADLOCK),
            Mistake("no cool-down", _no_cool_down, _once(0, 2, 1)),
            Mistake("plain tuples", _tuples, _PLAIN.format(("forward", 0))),
            Mistake("last in, first out", _stack, ORDER),
        ),
        run=_run_one_f_one_b,
    ),
    Exercise(
        id="05.micro_batches",
        title="How many micro-batches",
        task="How many micro-batches does a pipeline need so that its stages idle at most so many percent of the time? "
        "One stage never idles, and a step has at least one micro-batch.",
        stub=micro_batches_stub,
        reference=micro_batches,
        mistakes=(
            *(Mistake(name, wrong, hint) for name, (wrong, hint) in _COUNTS.items()),
            Mistake("in fractions", _in_fractions, _ROUNDED),
            Mistake("0 for one stage", _no_least, _ONE_STAGE),
        ),
        run=_run_micro_batches,
    ),
    Exercise(
        id="05.slow_links",
        title="Slow links, within a budget",
        task="A message takes half as long as a forward and a backward together. Write a schedule that is as fast as "
        "all-forward-all-backward, in which a stage keeps at most the activations of 2 (stages - 1 - stage) + 1 "
        "micro-batches. Time is simulated; bytes are counted on three real stages.",
        stub=slow_links_stub,
        reference=slow_links,
        mistakes=(
            Mistake("1F1B", one_f_one_b, _TOO_SLOW),
            Mistake("one more than 1F1B", _with_warm_up(lambda stage, stages: stages - stage), _TOO_SLOW),
            Mistake("all forward, all backward", all_forward_all_backward, _over_budget(0, MICRO_BATCHES)),
            Mistake("one deeper", _with_warm_up(lambda stage, stages: 2 * (stages - stage) - 1), _over_budget(0, 6)),
            Mistake("last in, first out", _stack, ORDER),
        ),
        run=_run_slow_links,
    ),
]  # fmt: skip
