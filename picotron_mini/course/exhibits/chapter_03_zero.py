"""Bug museum, room 03, the annex: data parallelism that is cut over its ranks (ZeRO)."""

# Replacing names that other modules import is what a mutant does, and what a type checker is there to prevent.
# mypy: disable-error-code="attr-defined, method-assign, assignment"
from __future__ import annotations

from dataclasses import replace

from ...layout import Placement
from ...parallel.zero import ShardedGradients, _Bucket
from ...parallel.zero3 import ShardedWeights, _Unit
from ..museum import MODEL, TRAIN, Exhibit


def norm_of_one_part() -> None:
    """The squared norm is that of the first data rank's rows, as if the others had copies of them."""
    real = Placement.counts

    def counts(self: Placement, index: dict[str, int]) -> bool:
        return real(self, index) and index["dp"] == 0

    Placement.counts = counts


def updated_alone() -> None:
    """Each rank updates its rows and keeps them to itself."""
    ShardedGradients.publish = lambda self, masters: None


def last_micro_batch_only() -> None:
    """The reduced rows of each micro-batch replace those of the one before."""

    def finish_oldest(self: ShardedGradients) -> None:
        bucket, _, total, work = self._under_way.popleft()
        work.wait()
        bucket.shard.copy_(total)

    ShardedGradients._finish_oldest = finish_oldest


def rows_left_over() -> None:
    """Only full parts of a table are sent: what an uneven parameter has beyond them is forgotten."""
    real = ShardedGradients._take_in

    def take_in(self: ShardedGradients, into: _Bucket) -> None:
        real(self, into)
        assert into.whole is not None
        for place in into.cuts:
            full = place.parameter.numel() // place.columns * place.columns
            place.table(into.whole, self.axis.size)[full:] = 0.0

    ShardedGradients._take_in = take_in


def kept_over_the_step() -> None:
    """The last unit's weights are not freed, to save the gather before its backward; after the update they are old."""
    real = ShardedWeights._free

    def free(self: ShardedWeights, unit: _Unit) -> None:
        if not hasattr(self, "uses") or unit is not self.units[-1]:
            real(self, unit)

    ShardedWeights._free = free


UNEVEN = replace(MODEL, vocab_size=36)  # 36, 24, 16 and 8 rows: 2 and 4 ranks divide them, 3 do not all

EXHIBITS = [
    Exhibit(
        id="03.norm_of_one_part",
        title="Clipped by the norm of a part",
        story="With sharded gradients torch.nn.utils.clip_grad_norm_ sees this rank's rows only. Its norm is too small "
        "by about the root of the number of ranks, so clipping hardly acts. Where each rank clips by the norm of its "
        "own rows, the parts are scaled by different factors as well, and their direction is no gradient's any more. "
        "FSDP has a clip_grad_norm_ of its own for that reason.",
        symptom="a gradient norm that falls when ranks are added; spikes that clipping should have cut.",
        patch=norm_of_one_part,
        killed_on=("dp=2", "dp=2,tp=2"),
        survives_on=(),
        train=replace(TRAIN, zero=2),
    ),
    Exhibit(
        id="03.updated_alone",
        title="The rows that nobody else got",
        story="ZeRO 1 ends a step with an all_gather of the updated weights. Forget it, and every rank goes on with "
        "its own rows new and all others old. The first step is right in every number: loss, gradients, norm, and the "
        "rows that each rank would save. A test of one step passes.",
        symptom="right for one step; then a loss that falls more slowly the more ranks there are.",
        patch=updated_alone,
        killed_on=("dp=2",),
        survives_on=(),
        train=replace(TRAIN, zero=1),
    ),
    Exhibit(
        id="03.last_micro_batch_only",
        title="ZeRO 2 without accumulation",
        story="From ZeRO 2 on, a micro-batch's gradients are reduced in its own backward, and what is kept is the sum "
        "of the results. A reduce_scatter writes its result, it does not add to it. Hand it the rows that are kept "
        "and all micro-batches but the last are lost.",
        symptom="right with one micro-batch; else the noise of a small batch at the price of a large one.",
        patch=last_micro_batch_only,
        killed_on=("dp=2",),
        survives_on=(),
        train=replace(TRAIN, zero=2),
    ),
    Exhibit(
        id="03.rows_left_over",
        title="The rows that were left over",
        story="Rows are cut over the ranks by a ceiling, so an uneven parameter ends in the middle of a rank's part. "
        "Code that copies full parts only is right for every size that the ranks divide, and widths are powers of "
        "two. Then somebody trains on three machines, or with an odd vocabulary.",
        symptom="a few rows of some parameters get no gradient, and only at some numbers of ranks.",
        patch=rows_left_over,
        killed_on=("dp=3",),
        survives_on=("dp=2", "dp=4"),
        model=UNEVEN,
        train=replace(TRAIN, zero=2),
    ),
    Exhibit(
        id="03.kept_over_the_step",
        title="Weights of the step before",
        story="The last unit of the forward is the first of the backward, so freeing it in between costs a gather for "
        "nothing, and FSDP can be told not to. Who keeps the whole weights beyond the backward computes the next step "
        "with them, while the optimizer has updated the rows they were made of.",
        symptom="training goes on, with one unit that is always the initial one; bytes are fewer than predicted.",
        patch=kept_over_the_step,
        killed_on=("dp=2", "dp=2,pp=2"),
        survives_on=(),
        train=replace(TRAIN, zero=3),
    ),
]
