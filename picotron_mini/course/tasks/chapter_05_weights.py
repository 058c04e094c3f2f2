"""Exercise of chapter 05, pipeline parallelism: where the weight gradients go once a backward is two halves.

As in `chapter_05.py` an answer is a schedule, and the clock judges it; no rank is started. Any order passes that is
legal, short enough and lean enough. With F, I and W of one unit each the reference takes, for m >= p,

    3 m + 2 (p - 1) - min(more, p - 1)        1F1B: 3 m + 3 (p - 1)        ZB-H1: 3 m + (p - 1), more = p - 1

so the I that is sent at once saves p - 1 units for no memory at all, and each micro-batch kept besides saves one more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...parallel.schedule_zero_bubble import zb_h1
from ...parallel.schedules import Action, Kind, Schedule, all_forward_all_backward, one_f_one_b, simulate
from ..exercises import Exercise, Mistake, NotAttempted
from .chapter_05 import DEADLOCK, ORDER

Answer = Callable[..., Any]
Size = tuple[int, int, int]  # stages, micro-batches, more
Lists = list[list[Action]]  # the actions of each stage
KINDS: tuple[Kind, Kind, Kind] = ("forward", "backward_input", "backward_weight")
SIZES = [
    (stages, micro_batches, more)
    for stages in (4, 3, 2, 5, 1)
    for micro_batches in (2 * stages + 1, stages, stages + 1, 3 * stages + 2)
    for more in range(stages + 1)
]


def units(stages: int, micro_batches: int, more: int) -> int:
    """How long a step may take."""
    return 3 * micro_batches + 2 * (stages - 1) - min(more, stages - 1)


def allowed(stage: int, stages: int, more: int) -> int:
    """How many micro-batches a stage may keep: `more` besides those of 1F1B, and on no stage more than `stages`."""
    return min(stages, stages - stage + more)


def late_weights_stub(stage: int, stages: int, micro_batches: int, more: int) -> list[Action]:
    """The actions of one stage, with the weight gradients where they shorten the step.

    Args:
        stage: 0 to stages - 1. F, I and W take one unit each, messages nothing.
        micro_batches: `stages` or more.
        more: 0 or more. The stage keeps at most min(stages, stages - stage + more) micro-batches, each from its F to
            its W.

    Returns:
        `Action("forward", m)`, `Action("backward_input", m)` and `Action("backward_weight", m)`, in order. The step
        takes at most 3 micro_batches + 2 (stages - 1) - min(more, stages - 1) units.
    """
    raise NotAttempted


def late_weights(stage: int, stages: int, micro_batches: int, more: int) -> list[Action]:
    """1F1B in halves. A W waits for as many I's as there are stages above that wait for them, or as memory allows."""
    wait = min(stage, more)
    actions = []
    for action in one_f_one_b(stage, stages, micro_batches):
        m = action.micro_batch
        if action.kind == "forward":
            actions.append(action)
        else:
            actions.append(Action("backward_input", m))
            if m >= wait:
                actions.append(Action("backward_weight", m - wait))
    return actions + [Action("backward_weight", m) for m in range(micro_batches - wait, micro_batches)]


# --- the hints --------------------------------------------------------------------------------------------

_PLAIN = (
    'the list holds {!r}, and this schedule is made of Action("forward", m), Action("backward_input", m) and '
    'Action("backward_weight", m)'
)
_EARLY = (
    "on each stage the F of a micro-batch comes before its I, and the I before its W: I goes back through what F has "
    "kept, and W multiplies what I has put aside"
)
_WHOLE = (
    "right, and no faster than 1F1B: a whole backward lets the stage above wait for a weight gradient that it does not "
    'need. Put Action("backward_input", m) and, there or later, Action("backward_weight", m) in its place'
)
_UNUSED = (
    "right with more=0, and the order is the same with any `more`. Who may keep a micro-batch longer may put off its "
    "W, and run the next I first, for which the stage above waits"
)
_FORWARDS = (
    "`more` is spent on forwards that run ahead: a stage runs more of them before its first I than under 1F1B. They "
    "delay the I, for which all stages above wait. Spend it on W's that wait"
)
_FIXED = "{}, and the order is the same with any `more`: how long a W can wait depends on how much may be kept"
_ALL_LAST = (
    "{}: each W comes after the last I. It would not even help: stage 0 is the last to get its gradients, and then "
    "has all its W's to do"
)
_NOBODY_ABOVE = "{}. No stage is above stage 0, so nobody waits for its I's, and to put off its W's is of no use"


def _at(stages: int, micro_batches: int, more: int) -> str:
    return f"with {stages} stages, {micro_batches} micro-batches and more={more}"


def _once(stage: int, size: Size) -> str:
    return (
        f"{_at(*size)} an action of stage {stage} is missing or repeated; each stage must run F, I and W of every "
        "micro-batch once. Is a W left when the last I has run?"
    )


def _over(stage: int, size: Size, kept: int) -> str:
    stages, _, more = size
    return f"{_at(*size)} stage {stage} keeps {kept} micro-batches at once; {allowed(stage, stages, more)} are allowed"


def _too_slow(size: Size, total: float) -> str:
    return (
        f"{_at(*size)} the step takes {total:g} units; {units(*size)} are enough. Does a W run while a stage above "
        "waits for an I, or a stage rest while it has a W to do?"
    )


# --- the check --------------------------------------------------------------------------------------------


def _in_halves(actions: list[Action]) -> list[Action]:
    """The same with I and W in place of each whole backward, which is legal here too."""
    both: tuple[Kind, Kind] = ("backward_input", "backward_weight")
    return [
        Action(kind, action.micro_batch, action.chunk)
        for action in actions
        for kind in (both if action.kind == "backward" else (action.kind,))
    ]


def _of_kind(actions: list[Action], kind: Kind) -> list[int]:
    return [action.micro_batch for action in actions if action.kind == kind]


def _illegal(lists: Lists, size: Size) -> str | None:
    """What is wrong with these lists at any clock, but for a deadlock."""
    wanted = {Action(kind, m) for kind in KINDS for m in range(size[1])}
    for stage, actions in enumerate(lists):
        if plain := [action for action in actions if not isinstance(action, Action)]:
            return _PLAIN.format(plain[0])
        if odd := [action for action in actions if action.kind not in (*KINDS, "backward")]:
            return _PLAIN.format(odd[0])
        halves = _in_halves(actions)
        if len(halves) != len(wanted) or set(halves) != wanted:
            return _once(stage, size)
        if any(_of_kind(halves, kind) != list(range(size[1])) for kind in KINDS[:2]):
            return ORDER
        at = {action: i for i, action in enumerate(halves)}
        for m in range(size[1]):
            if not at[Action("forward", m)] < at[Action("backward_input", m)] < at[Action("backward_weight", m)]:
                return _EARLY
    return None


def _why_over(stage: int, size: Size, kept: int, lists: Lists, unused: bool) -> str:
    """The hint to an answer that keeps too much."""
    told = _over(stage, size, kept)
    if all("backward_weight" not in [a.kind for a in actions[: -size[1]]] for actions in map(_in_halves, lists)):
        return _ALL_LAST.format(told)
    if unused:
        return _FIXED.format(told)
    return _NOBODY_ABOVE.format(told) if stage == 0 else told


def _why_slow(size: Size, total: float, lists: Lists, unused: bool) -> str:
    """The hint to an answer that keeps to its memory and takes too long."""
    if unused and size[2] > 0:
        return _UNUSED
    for stage, actions in enumerate(map(_in_halves, lists)):
        if [action.kind for action in actions].index("backward_input") > size[0] - stage:
            return _FORWARDS
    return _too_slow(size, total)


def _run_late_weights(answer: Answer) -> str | None:
    runs: dict[Size, Lists] = {}
    for size in SIZES:
        runs[size] = [list(answer(stage, *size)) for stage in range(size[0])]
        if problem := _illegal(runs[size], size):
            return problem
    if not any(_of_kind(actions, "backward_input") for lists in runs.values() for actions in lists):
        return _WHOLE
    unused = all(lists == runs[stages, m, 0] for (stages, m, _), lists in runs.items())
    for (stages, m, more), lists in runs.items():
        size = stages, m, more
        try:
            timeline = simulate(lambda stage, *_, lists=lists: lists[stage], stages, m)
        except ValueError:
            return DEADLOCK
        for stage, kept in enumerate(timeline.peak_live):
            if kept > allowed(stage, stages, more):
                return _why_over(stage, size, kept, lists, unused)
        if timeline.total > units(*size):
            return _why_slow(size, timeline.total, lists, unused)
    return None


# --- wrong answers ----------------------------------------------------------------------------------------


def _waiting(wait_of: Callable[[int, int, int], int], order: Schedule = one_f_one_b) -> Answer:
    """`order` in halves, each W put off by `wait_of(stage, stages, more)` I's."""

    def answer(stage: int, stages: int, micro_batches: int, more: int) -> list[Action]:
        wait, actions, ready = wait_of(stage, stages, more), list[Action](), list[Action]()
        for action in _in_halves(order(stage, stages, micro_batches)):
            if action.kind == "backward_weight":
                ready.append(action)
                actions += [ready.pop(0)] if len(ready) > wait else []
            else:
                actions.append(action)
        return actions + ready

    return answer


def _ahead(stage: int, stages: int, micro_batches: int, more: int) -> list[Action]:
    """Each W right after its I, and more forwards before the first I."""
    warm_up = min(stages - 1 - stage + min(more, stage), micro_batches)
    actions = [Action("forward", m) for m in range(warm_up)]
    for m in range(micro_batches):
        actions += [Action("forward", warm_up + m)] if warm_up + m < micro_batches else []
        actions += [Action("backward_input", m), Action("backward_weight", m)]
    return actions


def _beside_forwards(stage: int, stages: int, micro_batches: int, more: int) -> list[Action]:
    """As the reference, but a W runs only where a forward follows it; the rest at the end."""
    actions: list[Action] = []
    for action in late_weights(stage, stages, micro_batches, more):
        if action.kind != "backward_weight" or len(_of_kind(actions, "forward")) < micro_batches:
            actions.append(action)
    return actions + [action for action in late_weights(stage, stages, micro_batches, more) if action not in actions]


def _forgotten(stage: int, stages: int, micro_batches: int, more: int) -> list[Action]:
    actions = late_weights(stage, stages, micro_batches, more)
    return actions[: len(actions) - min(stage, more)]


def _weights_first(stage: int, stages: int, micro_batches: int, more: int) -> list[Action]:
    swap: dict[Kind, Kind] = {"backward_input": "backward_weight", "backward_weight": "backward_input"}
    return [Action(swap.get(a.kind, a.kind), a.micro_batch) for a in late_weights(stage, stages, micro_batches, 0)]


def _stack(stage: int, stages: int, micro_batches: int) -> list[Action]:
    actions = all_forward_all_backward(stage, stages, micro_batches)
    return actions[:micro_batches] + actions[micro_batches:][::-1]


def _upside_down(stage: int, stages: int, micro_batches: int) -> list[Action]:
    return one_f_one_b(stages - 1 - stage, stages, micro_batches)


def _letters(stage: int, stages: int, micro_batches: int, more: int) -> list[str]:
    return [str(action) for action in late_weights(stage, stages, micro_batches, more)]


EXERCISES = [
    Exercise(
        id="05.late_weights",
        title="Weight gradients that wait, within a budget",
        task="With the backward in two halves, I and W, write the order of one stage. A stage keeps at most `more` "
        "micro-batches more than under 1F1B, each from its F to its W, and none keeps more than `stages`. F, I and W "
        "take one unit each, and a step at most 3 micro_batches + 2 (stages - 1) - min(more, stages - 1). There are at "
        f"least as many micro-batches as stages. It is simulated for {len(SIZES)} sizes.",
        stub=late_weights_stub,
        reference=late_weights,
        mistakes=(
            Mistake("whole backwards", lambda stage, stages, m, more: one_f_one_b(stage, stages, m), _WHOLE),
            Mistake("each W right after its I", _waiting(lambda stage, stages, more: 0), _UNUSED),
            Mistake("all W's last", _waiting(lambda stage, stages, more: 10**6),
                    _ALL_LAST.format(_over(0, (4, 9, 0), 9))),
            Mistake("ZB-H1 at any price", lambda stage, stages, m, more: zb_h1(stage, stages, m),
                    _FIXED.format(_over(1, (4, 9, 0), 4))),
            Mistake("all or nothing", _waiting(lambda stage, stages, more: stage if more else 0),
                    _over(2, (4, 9, 1), 4)),
            Mistake("as long on each stage", _waiting(lambda stage, stages, more: more),
                    _NOBODY_ABOVE.format(_over(0, (4, 9, 1), 5))),
            Mistake("by the stages below", _waiting(lambda stage, stages, more: min(stages - 1 - stage, more)),
                    _NOBODY_ABOVE.format(_over(0, (4, 9, 1), 5))),
            Mistake("one longer", _waiting(lambda stage, stages, more: min(stage, more) + 1),
                    _NOBODY_ABOVE.format(_over(0, (4, 9, 0), 5))),
            Mistake("forwards ahead", _ahead, _FORWARDS),
            Mistake("by one at most", _waiting(lambda stage, stages, more: min(stage, more, 1)),
                    _too_slow((4, 9, 2), 32)),
            Mistake("none after the last forward", _beside_forwards, _too_slow((4, 9, 0), 36)),
            Mistake("the last W's forgotten", _forgotten, _once(1, (4, 9, 1))),
            Mistake("W before I", _weights_first, _EARLY),
            Mistake("last in, first out", _waiting(lambda stage, stages, more: 0, _stack), ORDER),
            Mistake("upside down", _waiting(lambda stage, stages, more: 0, _upside_down), DEADLOCK),
            Mistake("letters", _letters, _PLAIN.format("F0")),
        ),
        run=_run_late_weights,
    ),
]  # fmt: skip
