"""Bug museum, room 07: several axes at once, each of them right, and their agreement wrong.

The first needs two axes at once. The others pass wherever a trainer was tested before it got the axis that they forget.
Two more of this kind hang in other rooms: `05.stages_start_alike` and `06.one_data_rank_is_not_wrapped`.
"""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...config import MeshShape
from ...mesh import GROUPS, Axis, axis_with_key
from ...parallel import parallelize
from ...parallel.data import GradientBuckets
from ...parallel.parallelize import Parallel
from ...training import step
from ..museum import MODEL, Exhibit


def _dp_of(axis: Axis) -> Axis:
    """The dp axis inside an axis of dp and cp, through this rank."""
    rank = dist.get_rank()
    axes = (axis_with_key(key) for key in GROUPS if key.startswith("dp:") and str(rank) in key[3:].split(","))
    return next(axes, Axis("dp", 1, 0, (rank,))) if axis.name == "dp_cp" else axis


def two_numberings() -> None:
    """Groups are numbered with tp fastest, and the slices of the weights with tp slowest."""

    def tp_slowest(shape: MeshShape, rank: int) -> dict[str, int]:
        index = {}
        for axis in ("cp", "dp", "pp", "tp"):
            rank, index[axis] = divmod(rank, getattr(shape, axis))
        return index

    parallelize.coordinates = tp_slowest


def summed_over_dp_only() -> None:
    """Gradients are summed over dp, as they always were, and not over cp."""

    def buckets(parameters: Iterable[nn.Parameter], axis: Axis, size: float, reduce: Any = None) -> GradientBuckets:
        return GradientBuckets(parameters, _dp_of(axis), size, reduce)

    parallelize.GradientBuckets = buckets


def targets_counted_over_dp() -> None:
    """The loss is divided by the targets that the ranks of dp hold, of which cp ranks hold parts."""
    real = step.all_reduce
    step.all_reduce = lambda x, axis: real(x, _dp_of(axis))


def norm_per_stage() -> None:
    """Each pipeline stage clips its gradients by a norm of its own."""
    real_update, real_reduce = step.update, step.all_reduce
    stage, stages = 0, 1

    def update(parallel: Parallel, *rest: Any) -> Tensor:
        nonlocal stage, stages
        stage, stages = parallel.mesh["pp"].index, parallel.mesh["pp"].size
        return real_update(parallel, *rest)

    def reduce(x: Tensor, axis: Axis) -> Tensor:
        if axis.name != "world":
            return real_reduce(x, axis)
        of_stages = x.new_zeros(stages, 3)
        of_stages[stage] = x
        of_stages = real_reduce(of_stages, axis)  # loss, squared norm, stop: of each stage
        return torch.stack([of_stages[:, 0].sum(), of_stages[stage, 1], of_stages[:, 2].sum()])

    step.update, step.all_reduce = update, reduce


EXHIBITS = [
    Exhibit(
        id="07.two_numberings",
        title="Two ways to number the ranks",
        story="Who is rank 1 of dp=2,tp=2? With tp fastest it is the second tensor-parallel rank of the first replica, "
        "with tp slowest the first one of the second replica. Either works, as long as everything that asks gets the "
        "same answer: groups, slices of weights, the loader, checkpoints. Here slices are taken by one rule and groups "
        "made by the other. With a single axis there is only one way to number, so nothing shows.",
        symptom="all shapes fit; ranks that sum parts of one layer hold the same slice, or slices of the wrong half.",
        patch=two_numberings,
        killed_on=("dp=2,tp=2",),
        survives_on=("dp=4", "tp=2"),
        model=replace(MODEL, vocab_size=36),  # even: slices of unequal size would not get as far as a wrong number
    ),
    Exhibit(
        id="07.summed_over_dp_only",
        title="The axis that came later",
        story="A trainer sums gradients over dp, as it always did. Then context parallelism is added: attention "
        " is exact, the loss is right, and each rank's weights get the gradient of its own tokens only. "
        "Copies that should be one weight now differ along cp, whatever dp is.",
        symptom="the first loss is right; the copies of each weight drift apart along cp.",
        patch=summed_over_dp_only,
        killed_on=("dp=2,cp=2",),
        survives_on=("dp=2", "dp=2,tp=2"),
    ),
    Exhibit(
        id="07.targets_counted_over_dp",
        title="A loss divided by half of the tokens",
        story="The sum over all ranks is right only if it is divided by the targets of all ranks. Add an axis that "
        "shares the tokens out once more, count over the old axis as before, and loss and gradients are too large by "
        "the size of the new one. Clipping and AdamW both hide the scale of a gradient; the printed loss does not.",
        symptom="a loss cp times as large as on one device, and as large again as the next layout's.",
        patch=targets_counted_over_dp,
        killed_on=("dp=2,cp=2", "cp=2"),
        survives_on=("dp=2", "dp=2,tp=2"),
    ),
    Exhibit(
        id="07.norm_per_stage",
        title="A pipeline that clips in pieces",
        story="Clipping divides the whole gradient by its norm. A stage knows its own parameters, and a norm over them "
        "needs no message, so each stage clips by its own. Stages with large gradients are then scaled down and the "
        "others are not: the direction of the step changes, not only its length.",
        symptom="every stage prints another gradient norm; with clipping off nothing is wrong.",
        patch=norm_per_stage,
        killed_on=("pp=2",),
        survives_on=("dp=2", "dp=2,tp=2"),
    ),
]
