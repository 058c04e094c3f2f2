"""Bug museum, room 05: pipeline parallelism, where stages disagree about scale, start, weights or order."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...mesh import Axis
from ...parallel import parallelize, partial
from ...parallel.actions import Route
from ...parallel.receives import Receives
from ...parallel.schedules import SCHEDULES, Action
from ...training import step
from ..museum import TRAIN, Exhibit


def loss_not_divided() -> None:
    """In the pipeline the loss is divided for the log, and what backward sees is not."""
    real = step.run_pipeline

    def pipeline(
        actions: Sequence[Action], *, forward: Callable[[int, Tensor | None], Tensor], axis: Axis, **rest: Any
    ) -> Tensor:
        missing = len(actions) // 2  # F and B of each: the number of micro-batches

        def whole(m: int, hidden: Tensor | None) -> Tensor:
            output = forward(m, hidden)
            if not 0 < axis.index == axis.size - 1:
                return output
            return output + (missing - 1) * (output - output.detach())  # the value of output, `missing` times its slope

        return real(actions, forward=whole, axis=axis, **rest)

    step.run_pipeline = pipeline


def stages_start_alike() -> None:
    """Each stage draws its layers as if they were the first ones of the model."""
    build, draw = parallelize.GPT, parallelize.initial_weight
    first = 0

    def build_stage(config: Any, *, layers: range, **rest: Any) -> Any:
        nonlocal first
        first = layers[0]
        return build(config, layers=layers, **rest)

    def draw_local(config: Any, name: str, *rest: Any) -> Tensor:
        local = re.sub(r"^layers\.(\d+)", lambda match: f"layers.{int(match[1]) - first}", name)
        return draw(config, local, *rest)

    parallelize.GPT, parallelize.initial_weight = build_stage, draw_local


def tied_weight_not_exchanged() -> None:
    """First and last stage update their copies of the tied embedding each with its own gradient."""
    partial._exchange = lambda gradient, mesh, stages: None


def gradients_in_stack_order() -> None:
    """The last stage runs its backwards in the reverse of the order in which the others expect them."""
    real = SCHEDULES["afab"]

    def reversed_at_the_end(stage: int, stages: int, micro_batches: int) -> list[Action]:
        actions = real(stage, stages, micro_batches)
        if stage < stages - 1:
            return actions
        return actions[:micro_batches] + actions[: micro_batches - 1 : -1]

    def order_of_the_others(lists: Sequence[Sequence[Action]], route: Route) -> list[Receives]:
        micro_batches = len(lists[0]) // 2
        return in_one_order([real(stage, len(lists), micro_batches) for stage in range(len(lists))], route)

    in_one_order, step.receives_in_one_order = step.receives_in_one_order, order_of_the_others
    SCHEDULES["afab"] = reversed_at_the_end


EXHIBITS = [
    Exhibit(
        id="05.loss_not_divided",
        title="Gradients times the number of micro-batches",
        story="picotron's pipeline step divides the loss that it logs by the number of micro-batches, and not the loss "
        "that it calls backward on; its step without a pipeline divides both. At four micro-batches the gradient norm "
        "is 4.00 times too large, and the logged loss is right. AdamW divides by the gradient's own size, and clipping "
        "by its norm: both hide it from the weights.",
        symptom="the gradient norm differs between pp=1 and pp=2 by a whole factor; the losses agree, and after "
        "clipped steps the weights too.",
        patch=loss_not_divided,
        killed_on=("pp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
    Exhibit(
        id="05.stages_start_alike",
        title="Two stages, one seed",
        story="All ranks set the same seed and build their own layers, numbered from zero. So in picotron the stages "
        "of a pipeline start with identical weights: a model of 32 layers in 4 stages has 8 different ones.",
        symptom="a start that no single device would have; invisible without a pipeline.",
        patch=stages_start_alike,
        killed_on=("pp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
    Exhibit(
        id="05.tied_weight_not_exchanged",
        title="A tied weight that came apart",
        story="A tied embedding lives on the first stage, which looks tokens up, and on the last, which scores them. "
        "Its gradient is the sum of both uses. Without the exchange there are two weights under one name, and "
        "which of them is saved depends on the rank that saves.",
        symptom="training looks healthy; the loss after loading the saved weights does not.",
        patch=tied_weight_not_exchanged,
        killed_on=("pp=2",),
        survives_on=("dp=1", "dp=2"),
    ),
    Exhibit(
        id="05.gradients_in_stack_order",
        title="Last in, first out",
        story="Messages between stages carry no label; both sides go through the micro-batches in one order. If one "
        "stage runs its backwards as a stack does, its neighbour multiplies the gradient of micro-batch 2 with the "
        "activations of micro-batch 0. All shapes agree.",
        symptom="the last stage learns, the others do hardly.",
        patch=gradients_in_stack_order,
        killed_on=("pp=2",),
        survives_on=("dp=1", "dp=2"),
        train=replace(TRAIN, schedule="afab"),
    ),
]
