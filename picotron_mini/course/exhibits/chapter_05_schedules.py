"""Bug museum, room 05, at the back: backwards in two halves and several chunks a stage, where work or order is lost."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ...parallel import schedules
from ...parallel.actions import Action, Route
from ...parallel.data import GradientBuckets
from ...parallel.receives import Receives, receives_in_own_order
from ...training import step
from ..museum import MODEL, TRAIN, Exhibit


def last_weights_forgotten() -> None:
    """What is put off until the end of the step is never done: no W after the last I."""
    real = schedules.zb_h1

    def until_last_input(stage: int, stages: int, micro_batches: int) -> list[Action]:
        actions = real(stage, stages, micro_batches)
        last = actions.index(Action("backward_input", micro_batches - 1))
        return actions[: last + 2]  # and one W, which stage 0 does at once

    schedules.zb_h1 = until_last_input


def reduced_before_last_weights() -> None:
    """The reducer expects one addition to each gradient less than there will be."""
    real = GradientBuckets.arm

    def one_less(self: GradientBuckets, times: Mapping[nn.Parameter, int] | None = None) -> None:
        real(self, times and {parameter: n - 1 for parameter, n in times.items()})

    GradientBuckets.arm = one_less


def messages_in_own_order() -> None:
    """Each stage of a V receives in the order in which it needs its messages, not in that in which they are sent."""

    def own(lists: Sequence[Sequence[Action]], route: Route) -> list[Receives]:
        return [receives_in_own_order(actions, route, stage) for stage, actions in enumerate(lists)]

    step.receives_in_one_order = own


EXHIBITS = [
    Exhibit(
        id="05.last_weights_forgotten",
        title="Put off for ever",
        story="A zero-bubble schedule puts weight gradients off, and the queue is not empty when the last gradient has "
        "gone to the stage before: as many W are left as the stage has stages above it. Whoever ends the step with the "
        "last I loses them. Stage 0 has nothing left, so a test of one stage sees nothing.",
        symptom="the loss is right, and lower stages learn from a part of the batch only.",
        patch=last_weights_forgotten,
        killed_on=("pp=2",),
        survives_on=("dp=1", "dp=2"),
        train=replace(TRAIN, schedule="zb-h1"),
    ),
    Exhibit(
        id="05.reduced_before_last_weights",
        title="Reduced with a W to come",
        story="A whole backward makes all gradients final at once. With split backwards a norm's gradient is final in "
        "the last I and a matrix's in the last W, so a data-parallel reducer must be told how often each will still be "
        "added to. One too few, and the last micro-batch stays on its own rank.",
        symptom="right without data parallelism; with it the replicas drift apart.",
        patch=reduced_before_last_weights,
        killed_on=("dp=2",),
        survives_on=("dp=1", "pp=2"),
        train=replace(TRAIN, schedule="zb-h1"),
    ),
    Exhibit(
        id="05.messages_in_own_order",
        title="The next message is not the one I need",
        story="Messages between stages carry no label. On a line of stages both sides go through them in one order. In "
        "a V two streams share each direction: activations of one chunk and gradients of the other. A stage that "
        "starts its receives in the order of its own actions takes one for the other, and all shapes agree.",
        symptom="a loss that is wrong from the first step on.",
        patch=messages_in_own_order,
        killed_on=("pp=3",),
        survives_on=(),
        model=replace(MODEL, num_layers=7),
        train=replace(TRAIN, schedule="zb-v", micro_batches=6),
    ),
]
